"""checklist.chk: the MD5 of each file, as Meta sends it beside the shards and `md5sum` writes it. Needs no torch."""

import re
from pathlib import Path

from llama_mp.checkpoint.digests import OnProgress, Part, digests
from llama_mp.checkpoint.fault import Fault, without_path
from llama_mp.checkpoint.manifest import size_of, unlisted
from llama_mp.errors import RequestError
from llama_mp.files import read_small

CHECKLIST = "checklist.chk"
LINE = re.compile(r"([0-9a-fA-F]{32}) [ *]([^/\0]+)")


def read_checklist(folder: Path) -> tuple[dict[str, str], list[Fault]]:
    """The MD5 by file name, and what is wrong with the list itself."""
    try:
        text = read_small(folder / CHECKLIST).decode("utf-8")
    except UnicodeDecodeError as error:
        return {}, [Fault(CHECKLIST, None, f"cannot be read: {error}")]
    except RequestError as error:
        return {}, [Fault(CHECKLIST, None, without_path(error, folder / CHECKLIST))]
    sums: dict[str, str] = {}
    faults = []
    for number, line in enumerate(text.splitlines(), start=1):
        match = LINE.fullmatch(line.rstrip())
        if match and sums.setdefault(match[2], match[1].lower()) == match[1].lower():
            continue
        if line.strip():
            said = f"names {match[2]} with another MD5 than before" if match else "is not an MD5 and a file's name"
            faults.append(Fault(CHECKLIST, None, f"line {number} {said}"))
    return sums, faults if sums or faults else [Fault(CHECKLIST, None, "lists no file")]


def check_checklist(folder: Path, on_progress: OnProgress | None = None) -> list[Fault]:
    """What `folder` holds otherwise than its checklist.chk says: nothing, if it is whole."""
    sums, faults = read_checklist(folder)
    faults += unlisted(folder, sums, CHECKLIST) if not faults else []
    sizes = {name: size_of(folder / name) for name in sums}
    faults += [Fault(name, None, size) for name, size in sizes.items() if isinstance(size, str)]
    parts = {name: Part(folder / name, ((0, size),)) for name, size in sizes.items() if isinstance(size, int)}
    known = digests(list(parts.values()), on_progress, "md5")
    for name, part in parts.items():
        found = known[part]
        if isinstance(found, OSError):
            faults.append(Fault(name, None, f"cannot be read: {found.strerror}"))
        elif found != sums[name]:
            others = [other for other in sums if sums[other] == found]
            is_other = f": it is that of {others[0]}" if others else ""
            faults.append(Fault(name, None, f"MD5 differs from that in {CHECKLIST}{is_other}"))
    return faults
