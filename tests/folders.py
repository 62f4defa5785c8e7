"""Runs that write a folder of three files, to their end or not."""

from pathlib import Path

from llama_mp.partial import Partial

REQUEST = {"mp": 2, "files": {"a": "0123"}}
PARTS = ("one", "two", "three")
WHOLE = {name: f"content of {name}" for name in PARTS}


def finish(output: Path, request: dict = REQUEST, *, overwrite: bool = False, text: str = "content of") -> list[str]:
    """A run that writes one file for each part, and takes for whole what is written; the parts it wrote."""
    written = []
    with Partial(output, request, overwrite=overwrite) as folder:
        for name in PARTS:
            if name not in folder.parts:
                (folder.path / name).write_text(f"{text} {name}")
                folder.record(name, [name, 7])
                written.append(name)
        folder.commit()
    return written


def begin(output: Path, *parts: str, request: dict = REQUEST) -> Path:
    """What a run leaves that was killed after `parts`."""
    with Partial(output, request, overwrite=False) as folder:
        for name in parts:
            (folder.path / name).write_text(WHOLE[name])
            folder.record(name, [name, 7])
    return folder.path


def held(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
