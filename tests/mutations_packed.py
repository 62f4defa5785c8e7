"""Damage to archives, pickles, GGUF files and sentencepiece models by those who know these formats and mean ill."""

import io
import os
import pickle
import random
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from google.protobuf.message import Message
from sentencepiece.sentencepiece_model_pb2 import ModelProto

NUMBERS = (0, 1, 0x7F, 0xFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
NAMES = ("../canary", "/etc/passwd", "a/../../b", "", ".", "\x00", "\n", "\x1b[2J", "\u202e", "%s{0}", "x" * 70_000)

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
        Runs(os.mkdir, str(canary)), Runs(os.system, f"mkdir {canary}"),
        Runs(eval, f"__import__('os').mkdir({str(canary)!r})"),
        Runs(bytearray, size), Runs(torch.Tensor, size), Runs(torch.Tensor, 10**6, 10**6), Runs(torch.Size, [size] * 3),
        Runs(open, str(canary), "w"), Runs(getattr, Runs(__import__, "os"), "mkdir"), Runs(dict.fromkeys, "ab", 1),
    ))  # fmt: skip
    value = rng.choice((call, {"tok_embeddings.weight": call}, {call: 1}, [call] * 3))
    try:
        return pickle.dumps(value, protocol=2)
    except TypeError:  # not hashable
        return pickle.dumps([call], protocol=2)


STORAGES = (b"LongStorage", b"BoolStorage", b"ComplexFloatStorage", b"UntypedStorage", b"QInt8Storage")
REBUILDERS = (b"_rebuild_tensor", b"_rebuild_meta_tensor_no_storage", b"_rebuild_sparse_tensor", b"_rebuild_parameter")


def changed_pickle(content: bytes, rng: random.Random) -> bytes:
    """Another whole number, storage or function in place of one that the pickle names."""
    old, new = rng.choice((
        (b"FloatStorage", rng.choice(STORAGES)),
        (b"_rebuild_tensor_v2", rng.choice(REBUILDERS)),
        (b"cpu", rng.choice((b"cuda:0", b"meta", b"xyz"))),
        (b"storage", b"module"),
        (b"collections\nOrderedDict", b"builtins\nbytearray"),
        (b"tok_embeddings", b"\x1b[2J_embedding"),
    ))  # fmt: skip
    if rng.random() < 0.5 and old in content:
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
        value = rng.choice(
            (gguf_value(rng), gguf_value(rng), old[:4] + rng.randbytes(len(old) - 4) if len(old) < 20 else old[:-8])
        )
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
        "llama.feed_forward_length", "llama.attention.head_count", "llama.attention.head_count_kv",
        "llama.rope.freq_base", "llama.attention.layer_norm_rms_epsilon", "tokenizer.ggml.model",
        "tokenizer.ggml.tokens", "tokenizer.ggml.scores", "tokenizer.ggml.token_type", "tokenizer.ggml.merges",
        "tokenizer.ggml.pre", "tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id",
        "tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_space_prefix", "tokenizer.chat_template",
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
            field.TYPE_BYTES: (
                b"",
                b"\0" * 9,
                rng.randbytes(40),
                b"\xff\xff\xff\x7f",
                struct.pack("<I", 16) + rng.randbytes(40),
            ),
            field.TYPE_BOOL: (True, False),
            field.TYPE_FLOAT: (0.0, float("nan"), float("inf"), -1e38),
        }.get(field.type, (-1, 0, 1, 2, 3, 4, 5, 6, 2**31 - 1, -(2**31)))
        if field.is_repeated:
            message.ClearField(field.name)
            continue
        try:
            setattr(
                message,
                field.name,
                rng.choice(options).replace("\ud800", "") if field.type == field.TYPE_STRING else rng.choice(options),
            )
        except (ValueError, TypeError):  # not one of an enumeration's
            message.ClearField(field.name)
    if rng.random() < 0.2:
        model.pieces.append(rng.choice(model.pieces))
    if rng.random() < 0.2:
        del model.pieces[rng.randrange(len(model.pieces)) :]
    return model.SerializeToString()
