"""Whole folders with their manifest, ways to damage them, and what verify then says.

The manifest is made without the code that is tested: torch and json say where a tensor lies.
"""

import hashlib
import json
from pathlib import Path

import torch
from factory import random_tensors, write_meta
from torch._subclasses.fake_tensor import FakeTensorMode

from llama_mp.checkpoint.verify import Report, VerifyFlags, verify
from llama_mp.config import ModelConfig


def ranges_of(file: Path) -> dict[str, tuple[int, int]]:
    """(offset, number of bytes) of each tensor in a file of weights; nothing for another file."""
    if file.suffix == ".pth":
        with FakeTensorMode():
            tensors = torch.load(file, weights_only=True)
        return {name: (t.untyped_storage()._checkpoint_offset, t.nbytes) for name, t in tensors.items()}
    if file.suffix == ".safetensors":
        content = file.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:start])
        header.pop("__metadata__", None)
        places = {name: value["data_offsets"] for name, value in header.items()}
        return {name: (start + begin, end - begin) for name, (begin, end) in places.items()}
    return {}


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def file_entry(file: Path) -> dict:
    content, ranges = file.read_bytes(), ranges_of(file)
    if not ranges:
        return {"bytes": len(content), "sha256": sha256(content)}
    is_rest = bytearray(b"\1") * len(content)
    tensors = {}
    for name, (offset, num_bytes) in ranges.items():
        tensors[name] = {"offset": offset, "bytes": num_bytes, "sha256": sha256(content[offset : offset + num_bytes])}
        is_rest[offset : offset + num_bytes] = bytes(num_bytes)
    rest = bytes(byte for byte, kept in zip(content, is_rest, strict=True) if kept)
    return {"bytes": len(content), "tensors": tensors, "rest_sha256": sha256(rest)}


def write_manifest(folder: Path) -> dict:
    """The manifest of all that is in `folder`, written into it."""
    files = {file.name: file_entry(file) for file in sorted(folder.iterdir())}
    manifest = {"tool": "test", "format": "meta", "files": files}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return manifest


def flip(file: Path, offset: int) -> None:
    """Change one byte of `file`."""
    with file.open("r+b") as opened:
        opened.seek(offset)
        [byte] = opened.read(1)
        opened.seek(offset)
        opened.write(bytes([byte ^ 1]))


def exchange(one: Path, other: Path) -> None:
    held = one.rename(one.with_suffix(".held"))
    other.rename(one)
    held.rename(other)


def checked(path: Path, **flags: object) -> Report:
    return verify(VerifyFlags(path=path, **flags))


def faults(path: Path) -> list[str]:
    return list(map(str, checked(path).check.faults))


def whole_line(path: Path, **flags: object) -> str:
    report = checked(path, **flags)
    assert report.failure is None, report.lines
    [line] = report.lines
    assert json.loads(report.as_json)["whole"] is True
    return line


def change(folder: Path, rank: int, name: str, place: object, value: float) -> None:
    """Put `value` into a tensor of one shard."""
    file = folder / f"consolidated.{rank:02d}.pth"
    tensors = torch.load(file, weights_only=True)
    tensors[name][place] = value
    torch.save(tensors, file)


def meta(folder: Path, mp: int, config: ModelConfig) -> Path:
    return write_meta(folder, config, random_tensors(config), mp)
