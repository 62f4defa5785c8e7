"""Is a checkpoint whole? By the best means that it brings: its manifest, Meta's checklist, or its own structure.

torch is imported only where tensors are looked into: digests need none.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from llama_mp.checkpoint.checklist import CHECKLIST, check_checklist, read_checklist
from llama_mp.checkpoint.fault import WEIGHT_FILES, Difference, Fault, without_path
from llama_mp.checkpoint.manifest import MANIFEST, check_manifest, read_entries
from llama_mp.errors import RequestError, counted
from llama_mp.flags import REQUIRED, Flags, flag
from llama_mp.locate import Checkpoint, checkpoint_at, files_of, snapshot_of
from llama_mp.progress import Progress

if TYPE_CHECKING:
    from llama_mp.checkpoint.source import Source

MEANING = {
    "manifest": f"SHA-256 as in {MANIFEST}",
    "checklist": f"MD5 as in {CHECKLIST}",
    "structure": f"shapes, copies, padding and finite values; no {MANIFEST} or {CHECKLIST} is there",
}


@dataclass(frozen=True, kw_only=True)
class VerifyFlags(Flags):
    path: Path = flag(REQUIRED, "a folder of consolidated.NN.pth or safetensors, or a .gguf file", positional=True)
    against: Path | None = flag(None, "a checkpoint of any format and degree that must hold the same values")
    json: bool = flag(False, "print one JSON object instead of lines")


class Check(NamedTuple):
    """What is wrong, and how much was looked at. `num_tensors`: None where files were looked at as a whole."""

    method: Literal["manifest", "checklist", "structure"]
    faults: list[Fault]
    num_files: int = 0
    num_tensors: int | None = None
    num_bytes: int = 0


class LogitsCheck(NamedTuple):
    """Whether two checkpoints make the same logits, and what is to be said of it; None where they were not compared,
    and why."""

    equal: bool | None
    text: str

    @property
    def line(self) -> str:
        return f"not compared: {self.text}" if self.equal is None else self.text


@dataclass(frozen=True, kw_only=True)
class Report:
    path: Path
    check: Check
    against: Path | None
    differences: list[Difference]
    logits: LogitsCheck | None = None  # compare_logits.py makes them, once the rest has been looked at

    @property
    def failure(self) -> str | None:
        """The error's text, None when nothing is wrong."""
        told = [f"{counted(len(self.check.faults), 'fault')} in {self.path}"] if self.check.faults else []
        told += [f"{counted(len(self.differences), 'difference')} from {self.against}"] if self.differences else []
        told += ["other logits"] if self.logits and self.logits.equal is False else []
        remedy = "get what is named again" if self.check.faults else "keep the one that you trust"
        return f"{' and '.join(told)}: {remedy}" if told else None

    @property
    def lines(self) -> list[str]:
        logits = [f"logits: {self.logits.line}"] if self.logits else []
        if self.failure:
            return [*map(str, self.check.faults), *map(str, self.differences), *logits]
        method, _, num_files, num_tensors, num_bytes = self.check
        tensors = "" if num_tensors is None else f", {counted(num_tensors, 'tensor')}"
        equal = f"; equal to {self.against} in every value" if self.against else ""
        read = f"{counted(num_files, 'file')}{tensors}, {num_bytes} bytes"
        return [f"{self.path} is whole: {read}; {MEANING[method]}{equal}", *logits]

    @property
    def as_json(self) -> str:
        return json.dumps(
            {
                "path": str(self.path),
                "method": self.check.method,
                "whole": not self.check.faults,
                "faults": [{"file": file, "tensor": tensor, "fault": text} for file, tensor, text in self.check.faults],
                "against": str(self.against) if self.against else None,
                "differences": [{"tensor": tensor, "difference": text} for tensor, text in self.differences],
                "logits": self.logits and self.logits._asdict(),
            }
        )


def verify(flags: VerifyFlags) -> Report:
    """Raises RequestError when there is no checkpoint at one of the paths, or the other one cannot be opened."""
    path = snapshot_of(flags.path)
    if not path.exists() or not holds_list(path):
        refuse_without_weights(path)
    theirs = opened(flags.against) if flags.against else None
    check = check_folder(path)
    differences = differences_from(path, theirs) if theirs else []
    return Report(path=flags.path, check=check, against=flags.against, differences=differences)


def holds_list(path: Path) -> bool:
    return (path / MANIFEST).is_file() or (path / CHECKLIST).is_file()


def refuse_without_weights(path: Path) -> None:
    """Raise RequestError unless there is a checkpoint at `path`, be it a damaged one."""
    try:
        files_of(path)
    except RequestError:
        if not path.is_dir() or not any(any(path.glob(pattern)) for pattern in WEIGHT_FILES):
            raise


def check_folder(path: Path) -> Check:
    """`path` by the first method for which it has what is needed."""
    with Progress("checking") as progress:
        if (path / MANIFEST).is_file():
            faults = check_manifest(path, progress)
            entries, _ = read_entries(path)
            num_tensors = sum(len(entry.tensors) for entry in entries.values())
            return Check("manifest", faults, len(entries), num_tensors, sum(e.num_bytes for e in entries.values()))
        if (path / CHECKLIST).is_file():
            faults = check_checklist(path, progress)
            sums, _ = read_checklist(path)
            files = [path / name for name in sums if (path / name).is_file()]
            return Check("checklist", faults, len(files), None, sum(file.stat().st_size for file in files))
        try:
            checkpoint = checkpoint_at(path)
        except RequestError as error:
            return Check("structure", [Fault(path.name, None, without_path(error, path))])
        return check_itself(checkpoint, progress)


def check_itself(checkpoint: Checkpoint, progress: Progress) -> Check:
    import torch

    from llama_mp.checkpoint.structure import check_structure, count_tensors

    torch.set_num_threads(1)  # the threads are over tensors
    faults = check_structure(checkpoint, progress)
    num_tensors = None if faults else count_tensors(checkpoint)
    num_bytes = sum(file.stat().st_size for file in checkpoint.files)
    return Check("structure", faults, len(checkpoint.files), num_tensors, num_bytes)


def opened(path: Path) -> "Source":
    from llama_mp.checkpoint.load import open_source

    return open_source(checkpoint_at(path))


def differences_from(path: Path, theirs: "Source") -> list[Difference]:
    """In what the checkpoint at `path` differs from `theirs`."""
    import torch

    from llama_mp.checkpoint.compare import compare

    torch.set_num_threads(1)  # the threads are over tensors
    try:
        ours = opened(path)
    except RequestError as error:
        return [Difference(None, f"not compared: {error}")]
    with Progress("comparing") as progress:
        return list(compare(ours, theirs, on_progress=progress))
