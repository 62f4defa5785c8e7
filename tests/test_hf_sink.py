"""safetensors as we lay them out: read by the library, bounded, aligned, indexed as transformers wants it."""

import itertools
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from factory import MODELS, checkpoint, hugging_face, meta_tensors, random_tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import LlamaForCausalLM

from llama_mp.checkpoint.hf_sink import ALIGNMENT, MAX_FILE_BYTES, HFSink, in_groups
from llama_mp.checkpoint.load import open_source
from llama_mp.config import ModelConfig, load_size
from llama_mp.hf_config import hf_config_of
from llama_mp.layout import Shard, Span, global_shapes

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
INDEX = "model.safetensors.index.json"


def halves(tensor: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of wq or wk from pairs to halves, by shape alone."""
    return tensor.view(-1, head_dim // 2, 2, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)


def written(folder: Path, config: ModelConfig, tensors: Mapping[str, torch.Tensor], **options: int) -> HFSink:
    """The folder by way of the sink: its frame, and each tensor's bytes at its piece's place."""
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    values = hf_config_of(config, dtype="float32", bos_id=None, eos_ids=[])
    sink = HFSink(config, dtypes, values, **options)
    files = {name: bytearray(size) for name, size in sink.sizes.items()}
    for name, [piece] in sink.pieces.items():
        tensor = tensors[name] if piece.halved_heads is None else halves(tensors[name], piece.halved_heads)
        content = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        assert len(content) == piece.num_bytes and not any(files[piece.file][piece.offset :][: len(content)])
        files[piece.file][piece.offset : piece.offset + piece.num_bytes] = content
    for name, file in files.items():
        for offset, content in sink.frame(name, {}):
            assert not any(file[offset : offset + len(content)])
            file[offset : offset + len(content)] = content
        (folder / name).write_bytes(file)
    for name, content in sink.small_files().items():
        (folder / name).write_bytes(content)
    return sink


def mixed(config: ModelConfig) -> dict[str, torch.Tensor]:
    tensors = random_tensors(config)
    return {name: tensor.to(DTYPES[number % 3]) for number, (name, tensor) in enumerate(tensors.items())}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("max_file_bytes", [MAX_FILE_BYTES, 60_000])
def test_the_library_reads_it_and_we_read_it_back(tmp_path: Path, name: str, max_file_bytes: int) -> None:
    config = MODELS[name]
    tensors = mixed(config)
    sink = written(tmp_path, config, tensors, max_file_bytes=max_file_bytes)
    assert (len(sink.sizes) > 1) == (max_file_bytes == 60_000)
    found = {}
    for file in sink.sizes:
        with safe_open(tmp_path / file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            names = opened.keys()
            for key in names:
                assert key not in found
                found[key] = opened.get_tensor(key)
    assert set(found) == set(hugging_face(config).state_dict()) - (
        {"lm_head.weight"} if config.tied_embeddings else set()
    )
    source = open_source(checkpoint(tmp_path))
    for own, tensor in tensors.items():
        [piece] = sink.pieces[own]
        assert (found[piece.name].shape, found[piece.name].dtype) == (tensor.shape, tensor.dtype)
        part = source.read(own, Span(0, tensor.shape[0]), Span(0, tensor.shape[-1]))
        assert part.dtype == tensor.dtype and torch.equal(part, tensor)


@pytest.mark.parametrize("max_file_bytes", [MAX_FILE_BYTES, 40_000])
def test_transformers_loads_the_same_weights(tmp_path: Path, max_file_bytes: int) -> None:
    for config in (MODELS["gqa"], MODELS["tied"]):
        folder = tmp_path / config.name
        folder.mkdir()
        oracle = hugging_face(config)
        written(folder, config, meta_tensors(oracle), max_file_bytes=max_file_bytes)
        loaded, said = LlamaForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(said[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert {name: t.tolist() for name, t in loaded.state_dict().items()} == {
            name: t.tolist() for name, t in oracle.state_dict().items()
        }


def test_the_index_names_each_tensors_file_and_the_sum(tmp_path: Path) -> None:
    tensors = mixed(MODELS["gqa"])
    sink = written(tmp_path, MODELS["gqa"], tensors, max_file_bytes=60_000)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"] == {"total_size": sum(tensor.nbytes for tensor in tensors.values())}
    assert set(index["weight_map"].values()) == set(sink.sizes)
    for key, file in index["weight_map"].items():
        with safe_open(tmp_path / file, framework="pt") as opened:
            names = opened.keys()
            assert key in names
    count = len(sink.sizes)
    assert sorted(sink.sizes) == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def test_a_single_file_has_no_index(tmp_path: Path) -> None:
    written(tmp_path, MODELS["gqa"], random_tensors(MODELS["gqa"]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("order", [DTYPES, DTYPES[::-1], [torch.bfloat16, torch.float32]])
def test_each_tensor_is_aligned_to_its_elements(order: list[torch.dtype]) -> None:
    """With an odd number of 2-byte elements before them, 4-byte ones would stand askew in the order of names."""
    config = ModelConfig(
        name="odd", dim=3, num_layers=1, num_heads=1, num_kv_heads=1, hidden_dim=5, vocab_size=7, head_dim=2
    )
    names = list(global_shapes(config))
    dtypes = {name: order[number % len(order)] for number, name in enumerate(names)}
    sink = HFSink(config, dtypes, {})
    [(file, size)] = sink.sizes.items()
    begin = len(sink.headers[file])
    assert begin % ALIGNMENT == 0
    ends = {begin}
    for [piece] in sorted(sink.pieces.values(), key=lambda pieces: pieces[0].offset):
        assert piece.offset % piece.dtype.itemsize == 0
        assert piece.offset in ends  # no holes: the library refuses them
        ends.add(piece.offset + piece.num_bytes)
    assert max(ends) == size


@settings(deadline=None)
@given(st.lists(st.integers(1, 50), max_size=20), st.integers(1, 60))
def test_groups_are_bounded_whole_and_in_order(sizes: list[int], max_bytes: int) -> None:
    tensors = {str(i): Shard(name=str(i), shape=(size,), placements=()) for i, size in enumerate(sizes)}
    groups = in_groups(tensors, dict.fromkeys(tensors, torch.float16), max_bytes)
    assert [name for group in groups for name in group] == list(tensors)
    held = [[2 * shard.num_elements for shard in group.values()] for group in groups]
    assert all(sum(group) <= max_bytes or len(group) == 1 for group in held)
    # none is closed before its time: what follows would not have fitted
    assert all(sum(group) + after[0] > max_bytes for group, after in itertools.pairwise(held))


def test_files_of_65b_have_at_most_5_gb_each() -> None:
    config = load_size("65B")
    sink = HFSink(config, dict.fromkeys(global_shapes(config), torch.float16), {})
    assert max(sink.sizes.values()) <= 5 * 10**9 and sum(sink.sizes.values()) > 130 * 10**9
