"""A request to write a checkpoint anew: its flags, and all that can be refused before torch is imported."""

import json
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llama_mp.checkpoint.manifest import MANIFEST
from llama_mp.errors import RequestError
from llama_mp.files import sample_digest
from llama_mp.flags import REQUIRED, Flags, check_at_least, flag
from llama_mp.layout import check_degree
from llama_mp.locate import Checkpoint, checkpoint_at
from llama_mp.partial import finished
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
    output = flags.output
    if output.exists() and not output.is_dir():
        raise RequestError(f"--output {output} is a file; give a folder that is not there yet")
    if not output.absolute().parent.is_dir():
        parent = output.absolute().parent
        raise RequestError(
            f"--output {output}: there is no folder {parent}; make it: mkdir -p {shlex.quote(str(parent))}"
        )
    check_apart(checkpoint.path.resolve(), output.resolve())
    return checkpoint


def check_apart(source: Path, output: Path) -> None:
    """Raise RequestError where writing `output` would touch `source`."""
    if source == output or source in output.parents or output in source.parents:
        raise RequestError(f"--output {output} and --input {source} lie within one another; give another --output")


def request_of(flags: ReshardFlags, checkpoint: Checkpoint) -> dict[str, Any]:
    """What decides every byte of the output: a run continues another's only where this is equal."""
    described = {"meta": ["params.json"], "hf": ["config.json"], "gguf": []}[checkpoint.kind]
    files = [*checkpoint.files, *(checkpoint.path / name for name in described)]
    if checkpoint.tokenizer is not None:
        files.append(checkpoint.tokenizer)
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
    output, request = flags.output, request_of(flags, checkpoint)
    if not output.is_dir() or not os.listdir(output):
        return False
    if finished(output) == request:
        return True
    manifest = read_manifest(output)
    if flags.overwrite:
        if manifest or is_checkpoint(output):
            return False
        raise RequestError(
            f"--overwrite, but {output} is not a checkpoint alone: give another --output, or remove it yourself"
        )
    if all(manifest.get(key) == value for key, value in request.items()) and has_sizes(output, manifest):
        return True
    raise RequestError(f"--output {output} is not empty: give another folder, or --overwrite to replace it")


def is_checkpoint(folder: Path) -> bool:
    """Whether `folder` is a checkpoint and nothing more: no folder is in it."""
    try:
        return bool(checkpoint_at(folder)) and not any(path.is_dir() for path in folder.iterdir())
    except RequestError:
        return False


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder that we wrote, or an empty one."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def has_sizes(folder: Path, manifest: Mapping[str, Any]) -> bool:
    """Whether every file of the manifest is there with its size."""
    files = {name: entry["bytes"] for name, entry in manifest["files"].items()}
    return all((folder / name).is_file() and (folder / name).stat().st_size == size for name, size in files.items())
