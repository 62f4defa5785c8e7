"""Damage to files, drawn from a seeded generator: blind, and by those who know the format and mean ill."""

import io
import json
import os
import pickle
import random
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from google.protobuf.message import Message
from sentencepiece.sentencepiece_model_pb2 import ModelProto

GIB = 1 << 30
NUMBERS = (0, 1, 0x7F, 0xFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
NAMES = ("../canary", "/etc/passwd", "a/../../b", "", ".", "\x00", "\n", "\x1b[2J", "\u202e", "%s{0}", "x" * 70_000)
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
    return rng.choice((rng.randrange(len(content)), rng.randrange(min(200, len(content))), -1 - rng.randrange(min(150, len(content)))))


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
    return rng.choice((b"", b"<!DOCTYPE html><html>", b"version https://git-lfs.github.com/spec/v1\n", bytes(5000),
                       rng.randbytes(3000), b"PK\x03\x04", b"GGUF", b"[" * 100_000, b'{"a":' * 50_000, b"\xff\xfe{}"))  # fmt: skip


BLIND = (flipped, overwritten, cut, without_part, with_part_twice, other_content)


# ---- JSON ------------------------------------------------------------------------------------------------------


def nodes_of(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value below `value`."""
    pairs = list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
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
    return json.dumps(changed_tree(json.loads(content), rng), ensure_ascii=rng.random() < 0.5).encode(errors="surrogatepass")


def changed_lines(content: bytes, rng: random.Random, canary: Path) -> bytes:
    lines = content.split(b"\n")
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(lines))
        first, _, second = lines[at].partition(b" ")
        lines[at] = rng.choice((
            b"", lines[rng.randrange(len(lines))], lines[at] * 3, b"\xff\xfe", b"A" * 400_000 + b" " + second,
            first + b" %d" % rng.choice(NUMBERS), first + b" -1", first + b" " + b"9" * 5000, b"==== " + second,
            json.dumps(rng.choice(VALUES)).encode(), b"{{ 10 ** 10 ** 10 }}", b"{% for a in range(9**9) %}x{% endfor %}",
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


# ---- zip and pickle --------------------------------------------------------------------------------------------


class Runs:
    """An object whose unpickling calls `function`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def hostile_pickle(rng: random.Random, canary: Path) -> bytes:
    """Calls that make a folder, and calls of what torch's own list allows, with absurd arguments."""
    size = rng.choice((10**10, 2**40, 2**62))
    call = rng.choice((
        Runs(os.mkdir, str(canary)), Runs(os.system, f"mkdir {canary}"), Runs(eval, f"__import__('os').mkdir({str(canary)!r})"),
        Runs(bytearray, size), Runs(torch.Tensor, size), Runs(torch.Tensor, 10**6, 10**6), Runs(torch.Size, [size] * 3),
        Runs(open, str(canary), "w"), Runs(getattr, Runs(__import__, "os"), "mkdir"), Runs(dict.fromkeys, "ab", 1),
    ))  # fmt: skip
    value = rng.choice((call, {"tok_embeddings.weight": call}, {call: 1}, [call] * 3))
    try:
        return pickle.dumps(value, protocol=2)
    except TypeError:  # not hashable
        return pickle.dumps([call], protocol=2)


def changed_pickle(content: bytes, rng: random.Random) -> bytes:
    """Another whole number, storage or function in place of one that the pickle names."""
    old, new = rng.choice((
        (b"FloatStorage", rng.choice((b"LongStorage", b"BoolStorage", b"ComplexFloatStorage", b"UntypedStorage", b"QInt8Storage"))),
        (b"_rebuild_tensor_v2", rng.choice((b"_rebuild_tensor", b"_rebuild_meta_tensor_no_storage", b"_rebuild_sparse_tensor", b"_rebuild_parameter"))),
        (b"cpu", rng.choice((b"cuda:0", b"meta", b"xyz"))),
        (b"storage", b"module"),
        (b"collections\nOrderedDict", b"builtins\nbytearray"),
        (b"tok_embeddings", b"\x1b[2J_embedding"),
    ))  # fmt: skip
    if rng.random() < 0.5 and old in content:
        if old == b"tok_embeddings" or len(old) == len(new) or b"Storage" in old or b"_rebuild" in old:
            return content.replace(old, new) if rng.random() < 0.5 else content.replace(old, new, 1)
    changed, places = bytearray(content), [i for i, byte in enumerate(content) if byte in b"KMJ"]
    for _ in range(rng.randint(1, 4)):  # BININT1, BININT2, BININT: sizes, strides, offsets and numbers of elements
        at = rng.choice(places)
        width = {ord("K"): 1, ord("M"): 2, ord("J"): 4}[changed[at]]
        if rng.random() < 0.3:  # LONG1, of 8 bytes, for what does not fit; the memo's numbers stay
            changed[at : at + 1 + width] = b"\x8a\x08" + rng.choice(NUMBERS).to_bytes(8, "little")
            return bytes(changed)
        changed[at + 1 : at + 1 + width] = (rng.choice(NUMBERS) & (256**width - 1)).to_bytes(width, "little")
    return bytes(changed)


def changed_zip(content: bytes, rng: random.Random, canary: Path) -> bytes:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    [pickled] = [name for name in entries if name.endswith("data.pkl")]
    action = rng.randrange(8)
    pairs, compression = list(entries.items()), zipfile.ZIP_STORED
    if action <= 2:
        entries[pickled] = changed_pickle(entries[pickled], rng)
        pairs = list(entries.items())
    elif action == 3:
        entries[pickled] = hostile_pickle(rng, canary)
        pairs = list(entries.items())
    elif action == 4:
        pairs += [rng.choice(pairs), (rng.choice(NAMES).replace("\0", "")[:60_000] or "x", b"")]
    elif action == 5:
        compression = rng.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA))
    elif action == 6:
        pairs = [(name, b"" if rng.random() < 0.2 else value) for name, value in pairs if rng.random() < 0.9]
    else:
        name = rng.choice(("byteorder", "version", ".format_version", "constants.pkl", ".data/serialization_id"))
        folder = pickled.partition("/")[0]
        entries[f"{folder}/{name}"] = rng.choice((b"big", b"\xff\xff", b"", b"9" * 9999, rng.randbytes(50)))
        pairs = list(entries.items())
    whole = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(whole, "w", compression) as archive:
        warnings.simplefilter("ignore")  # of names that are there twice
        for name, value in pairs:
            archive.writestr(name, value)
    return with_odd_places(whole.getvalue(), rng) if rng.random() < 0.25 else whole.getvalue()


def with_odd_places(content: bytes, rng: random.Random) -> bytes:
    """Entries of the directory that lie where others do, or claim another size; or another directory."""
    changed, at = bytearray(content), content.find(b"PK\1\2")
    starts = []
    while at >= 0:
        starts.append(at)
        at = content.find(b"PK\1\2", at + 1)
    for _ in range(rng.randint(1, 3)):
        at = rng.choice(starts)
        field = rng.choice((20, 24, 42))  # compressed size, size, place
        changed[at + field : at + field + 4] = struct.pack("<I", rng.choice((0, starts[0], 2**31, 2**32 - 1, 40)))
    if rng.random() < 0.3:
        changed[-6:-2] = struct.pack("<I", rng.choice((0, 2**31, len(content))))  # the directory's place
    return bytes(changed)


# ---- GGUF ------------------------------------------------------------------------------------------------------

GGUF_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}


def gguf_text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def gguf_value(rng: random.Random, depth: int = 0) -> bytes:
    """A type and a value of it, hostile or not."""
    kind = rng.choice((*GGUF_SCALARS, 8, 8, 9, 9, 13, 2**32 - 1))
    if kind in GGUF_SCALARS:
        form = GGUF_SCALARS[kind]
        number = rng.choice((*NUMBERS, 8, 16, 32)) & (256 ** struct.calcsize(form) - 1)
        return struct.pack("<I", kind) + number.to_bytes(struct.calcsize(form), "little")
    if kind == 9 and depth < 6:
        count = rng.choice((0, 1, 3))
        items = b"".join(gguf_value(rng, depth + 1)[4:] for _ in range(count))
        return struct.pack("<IIQ", 9, rng.choice((*GGUF_SCALARS, 8, 9)), rng.choice((count, *NUMBERS))) + items
    return struct.pack("<I", kind) + gguf_text(rng.choice(NAMES).encode())


def changed_gguf(content: bytes, rng: random.Random, canary: Path) -> bytes:
    """A value of the metadata replaced by another one, or a tensor's dimensions, type and place."""
    keys = [key for key in GGUF_KEYS if key in content]
    if rng.random() < 0.7 and keys:
        at, end = gguf_pair(content, rng.choice(keys))
        old = content[at:end]
        value = rng.choice((gguf_value(rng), gguf_value(rng), old[:4] + rng.randbytes(len(old) - 4) if len(old) < 20 else old[:-8]))
        changed = content[:at] + value + content[end:]
    else:
        at = content.find(rng.choice((b"output_norm.weight", b"attn_q.weight", b"token_embd.weight")))
        at = content.index(b"weight", at) + 6
        changed = bytearray(content)
        for _ in range(rng.randint(1, 2)):
            field, width = rng.choice(((0, 4), (4, 8), (12, 8), (20, 4), (24, 8)))
            number = rng.choice((*NUMBERS, *range(40))) & (256**width - 1)
            changed[at + field : at + field + width] = number.to_bytes(width, "little")
    return bytes(changed)


GGUF_KEYS = [
    key.encode()
    for key in (
        "general.architecture", "general.name", "llama.block_count", "llama.context_length", "llama.embedding_length",
        "llama.feed_forward_length", "llama.attention.head_count", "llama.attention.head_count_kv", "llama.rope.freq_base",
        "llama.attention.layer_norm_rms_epsilon", "tokenizer.ggml.model", "tokenizer.ggml.tokens", "tokenizer.ggml.scores",
        "tokenizer.ggml.token_type", "tokenizer.ggml.merges", "tokenizer.ggml.pre", "tokenizer.ggml.bos_token_id",
        "tokenizer.ggml.eos_token_id", "tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_space_prefix", "tokenizer.chat_template",
    )
]  # fmt: skip


def gguf_pair(content: bytes, key: bytes) -> tuple[int, int]:
    """Where the type and the value of `key` begin and end in a whole file."""
    start = content.index(struct.pack("<Q", len(key)) + key) + 8 + len(key)
    kind, at = int.from_bytes(content[start : start + 4], "little"), start + 4
    if kind in GGUF_SCALARS:
        return start, at + struct.calcsize(GGUF_SCALARS[kind])
    if kind == 8:
        return start, at + 8 + int.from_bytes(content[at : at + 8], "little")
    item, count = struct.unpack_from("<IQ", content, at)
    at += 12
    if item in GGUF_SCALARS:
        return start, at + count * struct.calcsize(GGUF_SCALARS[item])
    for _ in range(count):
        at += 8 + int.from_bytes(content[at : at + 8], "little")
    return start, at


# ---- sentencepiece ---------------------------------------------------------------------------------------------


def changed_proto(content: bytes, rng: random.Random, canary: Path) -> bytes:
    model = ModelProto.FromString(content)
    for _ in range(rng.randint(1, 4)):
        message: Message = rng.choice((model.trainer_spec, model.normalizer_spec, rng.choice(model.pieces)))
        field = rng.choice(message.DESCRIPTOR.fields)
        options = {
            field.TYPE_STRING: NAMES,
            field.TYPE_BYTES: (b"", b"\0" * 9, rng.randbytes(40), b"\xff\xff\xff\x7f", struct.pack("<I", 16) + rng.randbytes(40)),
            field.TYPE_BOOL: (True, False),
            field.TYPE_FLOAT: (0.0, float("nan"), float("inf"), -1e38),
        }.get(field.type, (-1, 0, 1, 2, 3, 4, 5, 6, 2**31 - 1, -(2**31)))
        if field.is_repeated:
            message.ClearField(field.name)
            continue
        try:
            setattr(message, field.name, rng.choice(options).replace("\ud800", "") if field.type == field.TYPE_STRING else rng.choice(options))
        except (ValueError, TypeError):  # not one of an enumeration's
            message.ClearField(field.name)
    if rng.random() < 0.2:
        model.pieces.append(rng.choice(model.pieces))
    if rng.random() < 0.2:
        del model.pieces[rng.randrange(len(model.pieces)) :]
    return model.SerializeToString()


BY_FORMAT = {
    "zip": changed_zip,
    "gguf": changed_gguf,
    "safetensors": changed_safetensors,
    "json": changed_json,
    "lines": changed_lines,
    "proto": changed_proto,
}
