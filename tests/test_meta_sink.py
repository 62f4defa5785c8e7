"""Meta's shards as we lay them out, beside what torch.save writes of the same tensors."""

import io
import json
import pickletools
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from factory import MODELS, cut, random_tensors
from torch import nn

from llama_mp.checkpoint.meta_sink import MetaSink, Stored, pickled
from llama_mp.config import ModelConfig
from llama_mp.layout import shards
from llama_mp.params_json import read_params, stated_degree

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# What the pickle may name: what torch.load(weights_only=True) admits of plain tensors.
ADMITTED = {
    "torch._utils _rebuild_tensor_v2",
    "collections OrderedDict",
    "torch FloatStorage",
    "torch HalfStorage",
    "torch BFloat16Storage",
}


def content_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def written(folder: Path, config: ModelConfig, tensors: Mapping[str, torch.Tensor], mp: int) -> list[Path]:
    """The shards by way of the sink: its frame, and each piece's bytes as the tests' own cutting has them."""
    sink = MetaSink(config, {name: tensor.dtype for name, tensor in tensors.items()}, mp=mp, original=None)
    files = {name: bytearray(size) for name, size in sink.sizes.items()}
    checksums: dict[str, dict[str, int]] = {name: {} for name in files}
    for pieces in sink.pieces.values():
        for piece in pieces:
            content = content_of(cut(piece.shard, dict(tensors)).to(piece.dtype))
            assert len(content) == piece.num_bytes
            files[piece.file][piece.offset : piece.offset + piece.num_bytes] = content
            checksums[piece.file][piece.name] = zlib.crc32(content)
    for name, file in files.items():
        for offset, content in sink.frame(name, checksums[name]):
            file[offset : offset + len(content)] = content
        assert len(file) == sink.sizes[name]
        (folder / name).write_bytes(file)
    for name, content in sink.small_files().items():
        (folder / name).write_bytes(content)
    return [folder / name for name in files]


def saved(tensors: Mapping[str, torch.Tensor]) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(dict(tensors), file)
    file.seek(0)
    return file


def mixed(config: ModelConfig) -> dict[str, torch.Tensor]:
    """Tensors of all types in one model."""
    return {name: tensor.to(DTYPES[number % 3]) for number, (name, tensor) in enumerate(random_tensors(config).items())}


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("dtype", [*DTYPES, None], ids=str)
@pytest.mark.parametrize("mp", [1, 2, 3])
def test_torch_loads_what_torch_would_have_saved(
    tmp_path: Path, dtype: torch.dtype | None, mp: int, mmap: bool
) -> None:
    config = MODELS["gqa"]
    tensors = random_tensors(config, dtype) if dtype else mixed(config)
    for rank, file in enumerate(written(tmp_path, config, tensors, mp)):
        held = {name: cut(shard, tensors).to(tensors[name].dtype) for name, shard in shards(config, rank, mp).items()}
        ours, theirs = torch.load(file, weights_only=True, mmap=mmap), torch.load(saved(held), weights_only=True)
        assert type(ours) is type(theirs) and list(ours) == list(theirs)
        for name, tensor in theirs.items():
            assert (ours[name].shape, ours[name].dtype, ours[name].stride(), ours[name].requires_grad) == (
                (tensor.shape, tensor.dtype, tensor.stride(), tensor.requires_grad)
            )
            assert ours[name].storage_offset() == 0 and ours[name].untyped_storage().nbytes() == tensor.nbytes
            assert content_of(ours[name]) == content_of(tensor)


@pytest.mark.parametrize("name", MODELS)
def test_the_archives_are_sound(tmp_path: Path, name: str) -> None:
    for mp in (1, 3, 8):
        folder = tmp_path / str(mp)
        folder.mkdir()
        for file in written(folder, MODELS[name], random_tensors(MODELS[name], torch.float16), mp):
            with zipfile.ZipFile(file) as opened:
                assert opened.testzip() is None
                assert {name.split("/")[0] for name in opened.namelist()} == {file.stem}


def test_a_fault_of_the_bytes_is_seen(tmp_path: Path) -> None:
    [file] = written(tmp_path, MODELS["gqa"], random_tensors(MODELS["gqa"]), 1)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    with zipfile.ZipFile(io.BytesIO(content)) as opened:
        assert opened.testzip() is not None


def test_metas_way_of_loading(tmp_path: Path) -> None:
    """A module whose parameters have the shards' names and shapes takes them strictly, as Meta's example.py does."""
    config = MODELS["mha"]
    tensors = random_tensors(config)
    for rank, file in enumerate(written(tmp_path, config, tensors, 2)):
        module = nn.Module()
        for name, shard in shards(config, rank, 2, embedding_axis=1).items():
            parent = module
            *path, last = name.split(".")
            for part in path:
                if part not in dict(parent.named_children()):
                    parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            parent.register_parameter(last, nn.Parameter(torch.zeros(shard.shape)))
        found = module.load_state_dict(torch.load(file, map_location="cpu"), strict=True)
        assert not found.missing_keys and not found.unexpected_keys
        embeddings = tensors["tok_embeddings.weight"].chunk(2, dim=1)[rank]
        assert torch.equal(module.get_parameter("tok_embeddings.weight"), embeddings)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_pickle_names_nothing_but_plain_tensors(dtype: torch.dtype) -> None:
    stored = {"a": Stored("0", (3, 5), dtype), "b": Stored("1", (7,), dtype)}
    content = pickled(stored)
    strings, named = [], set()
    for code, argument, _ in pickletools.genops(content):
        if code.name == "GLOBAL":
            named.add(argument)
        assert code.name not in ("STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"), code
        if "UNICODE" in code.name:
            strings.append(argument)
    assert named <= ADMITTED and "torch._utils _rebuild_tensor_v2" in named
    assert {"a", "b", "storage", "0", "1", "cpu"} <= set(strings)


def test_the_pickle_names_what_torchs_own_does() -> None:
    tensors = {"a": torch.zeros(3, 5, dtype=torch.float16), "b": torch.zeros(7)}
    with zipfile.ZipFile(saved(tensors)) as opened:
        [name] = [name for name in opened.namelist() if name.endswith("/data.pkl")]
        theirs = opened.read(name)
    ours = pickled({name: Stored(str(i), tuple(t.shape), t.dtype) for i, (name, t) in enumerate(tensors.items())})

    def said(content: bytes) -> set[tuple[str, object]]:
        codes = {(code.name, argument) for code, argument, _ in pickletools.genops(content)}
        return {code for code in codes if code[0] in ("PROTO", "GLOBAL", "BINUNICODE")}

    assert said(ours) == said(theirs)


# ---- the folder ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [0, 1])
def test_embeddings_stay_on_their_axis_where_the_degree_divides(tmp_path: Path, axis: int) -> None:
    config = replace(MODELS["mha"], embedding_axis=axis)  # dim 64
    tensors = random_tensors(config)
    for mp, held_on in ((4, axis), (3, 0)):
        folder = tmp_path / str(mp)
        folder.mkdir()
        parts = [
            torch.load(file, weights_only=True)["tok_embeddings.weight"]
            for file in written(folder, config, tensors, mp)
        ]
        rows, cols = config.vocab_size, config.dim
        assert parts[0].shape == ((-(-rows // mp), cols) if held_on == 0 else (rows, cols // mp))
        joined = torch.cat(parts, dim=held_on)[:rows]
        assert torch.equal(joined, tensors["tok_embeddings.weight"])
        assert read_params(folder / "params.json") == config
        assert stated_degree(folder / "params.json") == mp


def test_metas_own_keys_are_kept() -> None:
    original = {"dim": 64, "n_layers": 2, "n_heads": 8, "multiple_of": 32, "norm_eps": 1e-5, "vocab_size": -1}
    sink = MetaSink(MODELS["mha"], dict.fromkeys(random_tensors(MODELS["mha"]), torch.float16), mp=2, original=original)
    params = json.loads(sink.small_files()["params.json"])
    assert original.items() <= params.items() and set(params) - set(original) == {"llama_mp"}
    assert (
        params["llama_mp"]["shards"] == sink.cut == {"mp": 2, "embedding_axis": 1, "padded_sizes": {"vocab_size": 332}}
    )


def test_places_do_not_overlap_and_are_aligned() -> None:
    config = MODELS["heads-9-3"]
    sink = MetaSink(config, {name: tensor.dtype for name, tensor in mixed(config).items()}, mp=4, original=None)
    for file, size in sink.sizes.items():
        at = 0
        pieces = [piece for of_name in sink.pieces.values() for piece in of_name if piece.file == file]
        for piece in sorted(pieces, key=lambda piece: piece.offset):
            assert piece.offset % 64 == 0 and piece.offset >= at
            at = piece.offset + piece.num_bytes
        assert at < size
