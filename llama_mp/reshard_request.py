"""A request to write a checkpoint anew: its flags, and all that can be refused before torch is imported."""

import json
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llama_mp.checkpoint.manifest import MANIFEST, read_entries, size_of
from llama_mp.errors import RequestError
from llama_mp.files import read_small, sample_digest
from llama_mp.flags import REQUIRED, Flags, check_at_least, flag
from llama_mp.layout import check_degree
from llama_mp.locate import Checkpoint, checkpoint_at
from llama_mp.partial import clean_up_after_kill, is_filled, partial_path, replaced_path
from llama_mp.tokenizer_export import SETTINGS_FILES
from llama_mp.tokenizer_files import folders_of_settings
from llama_mp.tokenizer_settings import find
from llama_mp.version import VERSION


@dataclass(frozen=True, kw_only=True)
class ReshardFlags(Flags):
    input: Path = flag(REQUIRED, "a folder of consolidated.NN.pth or safetensors, or a .gguf file; read only")
    output: Path = flag(REQUIRED, "the folder to write; it appears once it is whole, and the same command continues")
    mp: int | None = flag(None, "the number of shards to write; not for --format hf")
    format: Literal["meta", "hf"] = flag("meta", "consolidated.NN.pth, or Hugging Face's safetensors")
    dtype: Literal["keep", "fp16", "bf16", "fp32"] = flag("keep", "type of the weights; keep: quantized ones as fp32")
    overwrite: bool = flag(False, "replace a checkpoint that is in --output, or was begun there")
    dry_run: bool = flag(False, "say what would be written, and write nothing")
    check: bool = flag(False, "read the output back and compare all of it with the input")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, mp=1)
        if self.format == "meta" and self.mp is None:
            raise RequestError("--mp INT is missing: the number of shards to write")
        if self.format == "hf" and self.mp not in (None, 1):
            raise RequestError(f"--mp {self.mp} with --format hf: safetensors are not cut by degree; drop --mp")


def check_request(flags: ReshardFlags) -> Checkpoint:
    """The checkpoint to read. Raises RequestError when it is none, or cannot be written as asked, where asked."""
    checkpoint = checkpoint_at(flags.input)
    if flags.format == "meta":
        check_degree(checkpoint.config, flags.mp)
    check_output(flags.output)
    check_apart(checkpoint, flags.output)
    return checkpoint


def check_output(output: Path) -> None:
    """Raise RequestError where no folder can be written."""
    real = Path(os.path.realpath(output))
    if os.path.lexists(real) and not output.is_dir():
        raise RequestError(f"--output {output} is a file; give a folder that is not there yet")
    if os.path.ismount(output):
        raise RequestError(f"--output {output} is where a disk is mounted; give a folder below it: {output / 'NAME'}")
    if not real.parent.is_dir():
        raise RequestError(
            f"--output {output}: there is no folder {real.parent}; make it: mkdir -p {shlex.quote(str(real.parent))}"
        )


def check_apart(checkpoint: Checkpoint, output: Path) -> None:
    """Raise RequestError where writing `output` would touch the input: what its links lead to is of it too."""
    read = {path.resolve() for path in (checkpoint.path, *checkpoint.files, checkpoint.tokenizer) if path}
    for written in (output.resolve(), partial_path(output), replaced_path(output)):
        for source in read:
            if source == written or source in written.parents or written in source.parents:
                raise RequestError(
                    f"--output {written} and --input {source} lie within one another; give another --output"
                )


def request_of(flags: ReshardFlags, checkpoint: Checkpoint) -> dict[str, Any]:
    """What decides every byte of the output: a run continues another's only where this is equal."""
    described = {"meta": ["params.json"], "hf": ["config.json"], "gguf": []}[checkpoint.kind]
    files = [*checkpoint.files, *(checkpoint.path / name for name in described)]
    if checkpoint.tokenizer is not None:
        folders = folders_of_settings(checkpoint.tokenizer, checkpoint.path)
        files += [checkpoint.tokenizer, *filter(None, (find(name, folders) for name in SETTINGS_FILES))]
    return {
        "tool": f"llama-mp {VERSION}",
        "format": flags.format,
        "mp": flags.mp if flags.format == "meta" else None,
        "dtype": flags.dtype,
        "source": {
            "format": checkpoint.kind,
            "mp": len(checkpoint.files) if checkpoint.kind == "meta" else None,
            "files": {file.name: sample_digest(file) for file in files},
        },
    }


def is_finished(flags: ReshardFlags, checkpoint: Checkpoint) -> bool:
    """Whether --output holds what is asked for already. Raises RequestError when it holds anything else, unless
    --overwrite allows to replace a checkpoint."""
    output = flags.output
    if not is_filled(output):
        return False
    request = request_of(flags, checkpoint)
    if not flags.dry_run and clean_up_after_kill(output) == request:
        return True
    manifest = read_manifest(output)
    if flags.overwrite:
        if is_replaceable(output, manifest):
            return False
        raise RequestError(
            f"--overwrite, but {output} is not a checkpoint alone: give another --output, or remove it yourself"
        )
    if all(manifest.get(key) == value for key, value in request.items()) and has_sizes(output):
        return True
    raise RequestError(f"--output {output} is not empty: give another folder, or --overwrite to replace it")


def is_replaceable(folder: Path, manifest: Mapping[str, Any]) -> bool:
    """Whether `folder` is a checkpoint, or damaged one that we wrote, and nothing more: no folder is in it."""
    if any(path.is_dir() for path in folder.iterdir()):
        return False
    if str(manifest.get("tool")).startswith("llama-mp "):
        return True
    try:
        return bool(checkpoint_at(folder))
    except RequestError:
        return False


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder that we wrote, or an empty one."""
    try:
        manifest = json.loads(read_small(folder / MANIFEST))
    except (ValueError, RecursionError):  # a RequestError is a ValueError
        return {}
    return manifest if isinstance(manifest, dict) else {}


def has_sizes(folder: Path) -> bool:
    """Whether every file of the manifest is there with its size."""
    files, faults = read_entries(folder)
    return bool(files) and not faults and all(size_of(folder / name) == file.num_bytes for name, file in files.items())
