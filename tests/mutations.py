"""Damage to files, drawn from a seeded generator: blind, and by those who know the format and mean ill."""

import json
import os
import random
from pathlib import Path
from typing import Any

from mutations_packed import NAMES, NUMBERS, changed_gguf, changed_proto, changed_zip

GIB = 1 << 30
VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 3, 2**31, 2**53, 2**63, 2**70, 10**400, -(2**63), 0.0, -0.5, 1e-320, 1e308,
    float("nan"), float("inf"), [], {}, [[]], [None], {"a": 1}, {"content": 1}, [1, "a"], *NAMES, "\ud800", "default",
    "ByteLevel", "Metaspace", "(a+)+$", "[", "a{0,60000}",
)  # fmt: skip


def damage(path: Path, rng: random.Random, canary: Path) -> None:
    """Change the file `path`, one time in eight so that it is no regular file any more."""
    if rng.random() < 0.12:
        rng.choice(REPLACEMENTS)(path, rng)
        return
    content, knowing = path.read_bytes(), BY_FORMAT[format_of(path)]
    if rng.random() < 0.6:
        content = knowing(content, rng, canary)
    if content is None or rng.random() < 0.45:
        content = rng.choice(BLIND)(content or path.read_bytes(), rng)
    path.write_bytes(content)
    if rng.random() < 0.03:
        os.truncate(path, rng.choice((GIB, 5 * GIB, 40 * GIB)))


def format_of(path: Path) -> str:
    start = path.read_bytes()[:4]
    known = {b"PK\x03\x04": "zip", b"GGUF": "gguf"}
    if start in known:
        return known[start]
    by_suffix = {".safetensors": "safetensors", ".json": "json", ".jsonl": "lines", ".model": "proto"}
    kind = by_suffix.get(path.suffix, "lines")
    return "lines" if kind == "proto" and path.read_bytes()[:2] != b"\n\x0e" else kind


# ---- files that are none ---------------------------------------------------------------------------------------


def as_link(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.symlink_to(rng.choice(("/dev/zero", "/dev/full", "/proc/self/mem", path.name, "nowhere", "/", "..")))


def as_folder(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.mkdir()


def as_pipe(path: Path, rng: random.Random) -> None:
    path.unlink()
    os.mkfifo(path)


def as_hole(path: Path, rng: random.Random) -> None:
    """A file of gigabytes that takes no room: zeros alone, or after its proper beginning."""
    content = path.read_bytes()
    with path.open("wb") as file:
        file.write(content[: rng.choice((0, 8, 100, len(content)))])
    os.truncate(path, rng.choice((GIB, 6 * GIB, 1 << 40)))


def as_other_name(path: Path, rng: random.Random) -> None:
    path.rename(path.with_name(rng.choice(("consolidated.07.pth", "model.safetensors", "a.gguf", "params.json", "x"))))


def as_nothing(path: Path, rng: random.Random) -> None:
    path.unlink()


REPLACEMENTS = (as_link, as_folder, as_pipe, as_hole, as_other_name, as_nothing)


# ---- blind damage ----------------------------------------------------------------------------------------------


def place(content: bytes, rng: random.Random) -> int:
    """Somewhere in `content`: half of the time near its start or end, where headers are."""
    if not content:
        return 0
    return rng.choice(
        (rng.randrange(len(content)), rng.randrange(min(200, len(content))), -1 - rng.randrange(min(150, len(content))))
    )


OTHERS = (
    b"",
    b"<!DOCTYPE html><html>",
    b"version https://git-lfs.github.com/spec/v1\n",
    bytes(5000),
    b"PK\x03\x04",
    b"GGUF",
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b"\xff\xfe{}",
)


def flipped(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content or b"\0")
    for _ in range(rng.randint(1, 6)):
        changed[place(changed, rng)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def overwritten(content: bytes, rng: random.Random) -> bytes:
    at = place(content, rng) % max(1, len(content))
    patch = rng.choice((NUMBERS[rng.randrange(len(NUMBERS))].to_bytes(8, "little"), rng.randbytes(16), bytes(64)))
    return content[:at] + patch + content[at + len(patch) :]


def cut(content: bytes, rng: random.Random) -> bytes:
    return content[: place(content, rng)]


def without_part(content: bytes, rng: random.Random) -> bytes:
    at = place(content, rng) % max(1, len(content))
    return content[:at] + content[at + rng.choice((1, 4, 8, 100, 5000)) :]


def with_part_twice(content: bytes, rng: random.Random) -> bytes:
    at = place(content, rng) % max(1, len(content))
    return content[:at] + content[at : at + rng.choice((1, 8, 100, 5000))] + content[at:]


def other_content(content: bytes, rng: random.Random) -> bytes:
    return rng.choice(OTHERS) if rng.random() < 0.8 else rng.randbytes(3000)


BLIND = (flipped, overwritten, cut, without_part, with_part_twice, other_content)


# ---- JSON ------------------------------------------------------------------------------------------------------


def nodes_of(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value below `value`."""
    pairs = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    return [found for key, item in pairs for found in [(value, key), *nodes_of(item)]]


def changed_tree(tree: Any, rng: random.Random) -> Any:
    for _ in range(rng.randint(1, 3)):
        nodes = nodes_of(tree)
        top = [(tree, key) for key in tree] if isinstance(tree, dict) else nodes
        if not nodes:
            return rng.choice(VALUES)
        container, key = rng.choice(rng.choice((nodes, top)))
        action = rng.randrange(4)
        if action == 0:
            del container[key]
        elif action == 1 and isinstance(container, dict):
            container[rng.choice(NAMES)] = container.pop(key)
        elif action == 2:
            container[key] = [container[key]] * rng.choice((1, 2, 100))
        else:
            container[key] = rng.choice(VALUES)
    return tree


def changed_json(content: bytes, rng: random.Random, canary: Path) -> bytes:
    return json.dumps(changed_tree(json.loads(content), rng), ensure_ascii=rng.random() < 0.5).encode(
        errors="surrogatepass"
    )


def changed_lines(content: bytes, rng: random.Random, canary: Path) -> bytes:
    lines = content.split(b"\n")
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(lines))
        first, _, second = lines[at].partition(b" ")
        lines[at] = rng.choice((
            b"", lines[rng.randrange(len(lines))], lines[at] * 3, b"\xff\xfe", b"A" * 400_000 + b" " + second,
            first + b" %d" % rng.choice(NUMBERS), first + b" -1", first + b" " + b"9" * 5000, b"==== " + second,
            json.dumps(rng.choice(VALUES)).encode(), b"{{ 10 ** 10 ** 10 }}",
            b"{% for a in range(9**9) %}x{% endfor %}",
        ))  # fmt: skip
    return b"\n".join(lines)


# ---- safetensors -----------------------------------------------------------------------------------------------


def changed_safetensors(content: bytes, rng: random.Random, canary: Path) -> bytes:
    length = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + length], content[8 + length :]
    if rng.random() < 0.2:
        return rng.choice(NUMBERS).to_bytes(8, "little") + header + data
    tree = json.loads(header)
    if rng.random() < 0.5:
        tensor = rng.choice([value for name, value in tree.items() if name != "__metadata__"])
        tensor[rng.choice(("dtype", "shape", "data_offsets"))] = rng.choice((
            [rng.choice(NUMBERS) for _ in range(rng.randint(0, 3))], "I64", "F8_E4M3", "BOOL", "F64", [0, len(data)],
        ))  # fmt: skip
        header = json.dumps(tree).encode()
    elif rng.random() < 0.2:
        header = json.dumps(tree).encode().replace(b'"model.norm.weight"', b'"lm_head.weight"')
    else:
        header = json.dumps(changed_tree(tree, rng)).encode()
    return len(header).to_bytes(8, "little") + header + data


BY_FORMAT = {
    "zip": changed_zip,
    "gguf": changed_gguf,
    "safetensors": changed_safetensors,
    "json": changed_json,
    "lines": changed_lines,
    "proto": changed_proto,
}
