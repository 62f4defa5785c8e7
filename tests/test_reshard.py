"""There and back over every degree and format, bit for bit; and the oracle's own loader on what was written."""

import json
import os
import re
import shutil
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import pytest
import torch
from damage import exchange, faults, flip
from factory import MODELS, checkpoint, hugging_face, meta_tensors, random_tensors, write_gguf, write_hf, write_meta
from gguf import GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from llama_mp.checkpoint import cut
from llama_mp.checkpoint import reshard as reshard_module
from llama_mp.checkpoint.hf_sink import HFSink
from llama_mp.checkpoint.load import open_source
from llama_mp.checkpoint.reshard import Job, own_embedding_axis
from llama_mp.config import ModelConfig, load_size
from llama_mp.errors import RequestError, RunError
from llama_mp.layout import Span, matrix_shape
from llama_mp.reshard_request import ReshardFlags, check_request

SIXTEEN = replace(MODELS["gqa"], name="16 heads", num_heads=16, num_kv_heads=4, dim=128, head_dim=8)
FIFTY_TWO = replace(MODELS["mha"], name="52 heads", num_heads=52, num_kv_heads=52, dim=104, head_dim=2, num_layers=1)
SHAPES = [MODELS[name] for name in ("mha", "gqa", "tied", "heads-9-3", "heads-13-13")] + [SIXTEEN, FIFTY_TWO]


def reshard(source: Path, output: Path, **flags: object) -> Path:
    """What the command does, in this process."""
    flags = ReshardFlags(input=source, output=output, **({"mp": 1} | flags))
    Job.open(flags, check_request(flags)).run()
    return output


def shard_tensors(folder: Path) -> list[dict[str, torch.Tensor]]:
    return [torch.load(file, weights_only=True) for file in sorted(folder.glob("consolidated.*.pth"))]


def global_tensors(path: Path) -> dict[str, torch.Tensor]:
    source = open_source(checkpoint(path))
    return {name: source.read(name, *spans(source.shape(name))).clone() for name in source.names()}


def spans(shape: tuple[int, ...]) -> tuple[Span, Span]:
    rows, cols = matrix_shape(shape)
    return Span(0, rows), Span(0, cols)


def same_bits(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return list(ours) == list(theirs) and all(
        (ours[name].shape, ours[name].dtype) == (theirs[name].shape, theirs[name].dtype)
        and torch.equal(ours[name].view(torch.uint8), theirs[name].view(torch.uint8))
        for name in ours
    )


# ---- degrees ---------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    config=st.sampled_from(SHAPES),
    axis=st.sampled_from([0, 1]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    degrees=st.tuples(*[st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8, 16])] * 2),
    chunk=st.sampled_from([1, 1000, 1 << 21]),
)
def test_a_detour_over_any_degree_gives_the_same_tensors(
    config: ModelConfig, axis: int, dtype: torch.dtype, degrees: tuple[int, int], chunk: int
) -> None:
    n, m = (min(degree, config.num_heads) for degree in degrees)
    config = replace(config, embedding_axis=axis)
    # in memory: on a disk two thirds of the time are syncing, and deleting what was synced
    with TemporaryDirectory(dir="/dev/shm") as folder, pytest.MonkeyPatch.context() as patch:
        source = write_meta(Path(folder, "n"), config, random_tensors(config, dtype), n)
        patch.setattr(cut, "CHUNK_ELEMENTS", chunk)
        reshard(source, Path(folder, "m"), mp=m)
        reshard(Path(folder, "m"), Path(folder, "back"), mp=n)
        for ours, theirs in zip(shard_tensors(Path(folder, "back")), shard_tensors(source), strict=True):
            assert same_bits(ours, theirs)


@pytest.mark.parametrize("mp", [1, 2, 3, 8, 16])
def test_every_shard_is_what_the_layout_says(tmp_path: Path, mp: int) -> None:
    """The oracle of the tests cuts them: padding is zero, and copies of KV heads are equal."""
    tensors = random_tensors(SIXTEEN, torch.bfloat16)
    source = write_meta(tmp_path / "4", SIXTEEN, tensors, 4)
    reshard(source, tmp_path / "out", mp=mp)
    expected = write_meta(tmp_path / "expected", SIXTEEN, tensors, mp)
    for ours, theirs in zip(shard_tensors(tmp_path / "out"), shard_tensors(expected), strict=True):
        assert same_bits(ours, theirs)


def test_the_axis_of_the_embeddings_survives_a_degree_that_does_not_allow_it(tmp_path: Path) -> None:
    config = MODELS["mha"]  # its 64 dimensions do not divide by 3
    source = write_meta(tmp_path / "2", config, random_tensors(config), 2)
    reshard(source, tmp_path / "3", mp=3)
    cut_so = json.loads((tmp_path / "3" / "params.json").read_text())["llama_mp"]["shards"]
    assert (cut_so["mp"], cut_so["embedding_axis"]) == (3, 0)
    assert set(cut_so["padded_sizes"]) == {"num_heads", "num_kv_heads", "vocab_size"}
    reshard(tmp_path / "3", tmp_path / "1", mp=1)
    reshard(tmp_path / "1", tmp_path / "4", mp=4)
    assert shard_tensors(tmp_path / "4")[0]["tok_embeddings.weight"].shape == (config.vocab_size, config.dim // 4)


def test_a_model_of_metas_gets_metas_axis_from_one_shard(tmp_path: Path) -> None:
    """What Meta's own loader needs: LLaMA 1 and 2 split embeddings by dimension, Llama 3 by vocabulary."""
    for size, axis in (("7B", 1), ("llama2-70b", 1), ("llama3-8b", 0)):
        known = load_size(size)
        source = SimpleNamespace(config=replace(known, embedding_axis=0))  # one shard tells no axis
        assert own_embedding_axis(SimpleNamespace(kind="hf", files=(), config=known), source) == axis


def test_metas_own_keys_stay_and_the_folder_explains_itself(tmp_path: Path) -> None:
    config = MODELS["heads-9-3"]
    source = write_meta(tmp_path / "1", config, random_tensors(config), 1)
    own = {
        "dim": 72,
        "n_layers": 2,
        "n_heads": 9,
        "n_kv_heads": 3,
        "vocab_size": -1,
        "multiple_of": 30,
        "norm_eps": 1e-5,
    }
    (source / "params.json").write_text(json.dumps(own | {"ffn_dim_multiplier": 0.45}))
    reshard(source, tmp_path / "2", mp=2)
    params = json.loads((tmp_path / "2" / "params.json").read_text())
    assert {key: params[key] for key in own} == own
    assert params["llama_mp"]["vocab_size"] == config.vocab_size  # 331, which two shards hold as 332
    reshard(tmp_path / "2", tmp_path / "back", mp=1)
    [ours], [theirs] = shard_tensors(tmp_path / "back"), shard_tensors(source)
    assert same_bits(ours, theirs)


def test_archives_are_whole_and_read_by_torch_in_every_way(tmp_path: Path) -> None:
    config = MODELS["gqa"]
    reshard(write_meta(tmp_path / "1", config, random_tensors(config), 1), tmp_path / "3", mp=3)
    for file in (tmp_path / "3").glob("*.pth"):
        assert zipfile.ZipFile(file).testzip() is None
        mapped = torch.load(file, weights_only=True, mmap=True)
        assert same_bits(mapped, torch.load(file, weights_only=True))
        assert all(tensor.data_ptr() % 64 == 0 for tensor in mapped.values())


# ---- formats ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_hugging_face_loads_what_is_written_and_it_comes_back(tmp_path: Path, name: str) -> None:
    config = MODELS[name]
    model = hugging_face(config)
    source = write_meta(tmp_path / "3", config, meta_tensors(model), 3)
    folder = reshard(source, tmp_path / "hf", mp=None, format="hf", check=True)
    loaded = LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager")
    assert loaded.dtype == torch.float32
    ids = torch.tensor([[1, 17, 300, 4, 250]])
    with torch.inference_mode():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    reshard(folder, tmp_path / "back", mp=3)
    for ours, theirs in zip(shard_tensors(tmp_path / "back"), shard_tensors(source), strict=True):
        assert same_bits(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_many_files_with_their_index(tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reshard_module, "HFSink", partial(HFSink, max_file_bytes=60_000))
    config = MODELS["rope"]
    model = hugging_face(config).to(dtype)
    folder = reshard(write_hf(tmp_path / "one", model), tmp_path / "many", mp=None, format="hf")
    weights = sorted(file.name for file in folder.glob("*.safetensors"))
    assert len(weights) > 3 and weights[0] == f"model-00001-of-{len(weights):05d}.safetensors"
    assert max((folder / file).stat().st_size for file in weights) <= 60_000 + 2000  # its header comes on top
    loaded = LlamaForCausalLM.from_pretrained(folder)
    assert loaded.dtype == dtype and loaded.config.rope_parameters == model.config.rope_parameters
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in model.state_dict().items())


def test_gguf_to_both_holds_what_is_read_from_it(tmp_path: Path) -> None:
    config = MODELS["gqa"]
    config = replace(config, dim=128, head_dim=16, hidden_dim=96)
    path = write_gguf(tmp_path / "m.gguf", config, random_tensors(config), GGMLQuantizationType.Q4_1)
    expected = global_tensors(path)
    reshard(path, tmp_path / "meta", mp=3, check=True)
    reshard(tmp_path / "meta", tmp_path / "hf", mp=None, format="hf", check=True)
    assert all(same_bits({n: global_tensors(tmp_path / to)[n] for n in expected}, expected) for to in ("meta", "hf"))


@pytest.mark.parametrize("name", ["fp16", "bf16", "fp32"])
def test_another_type(tmp_path: Path, name: str) -> None:
    config, dtype = MODELS["tied"], {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[name]
    tensors = random_tensors(config)
    reshard(write_meta(tmp_path / "1", config, tensors, 1), tmp_path / "2", mp=2, dtype=name, check=True)
    assert same_bits(global_tensors(tmp_path / "2"), {n: tensor.to(dtype) for n, tensor in tensors.items()})


def test_a_number_beyond_the_type_is_refused_by_name(tmp_path: Path) -> None:
    config = MODELS["tied"]
    tensors = random_tensors(config)
    tensors["layers.1.feed_forward.w2.weight"][3, 5] = -7e4
    source = write_meta(tmp_path / "1", config, tensors, 1)
    with pytest.raises(RunError, match=r"layers.1.feed_forward.w2.weight holds 70000, .*float16 .*use another --dtype"):
        reshard(source, tmp_path / "2", mp=2, dtype="fp16")
    assert not (tmp_path / "2").exists()


# ---- whole -----------------------------------------------------------------------------------------------------


def test_the_manifest_holds_for_what_was_written_and_names_what_changes(tmp_path: Path) -> None:
    config = MODELS["heads-9-3"]
    folder = reshard(write_meta(tmp_path / "1", config, random_tensors(config), 1), tmp_path / "3", mp=3)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest["files"]) == {path.name for path in folder.iterdir()} - {"manifest.json"}
    assert (manifest["source"]["mp"], manifest["mp"], manifest["format"]) == (1, 3, "meta")
    assert manifest["tool"].startswith("llama-mp ")
    assert faults(folder) == []
    name = "layers.1.attention.wo.weight"
    place = manifest["files"]["consolidated.02.pth"]["tensors"][name]
    flip(folder / "consolidated.02.pth", place["offset"] + place["bytes"] // 2)
    assert faults(folder) == [f"consolidated.02.pth: {name}: SHA-256 differs from the manifest's"]
    flip(folder / "consolidated.02.pth", place["offset"] + place["bytes"] // 2)
    exchange(folder / "consolidated.00.pth", folder / "consolidated.01.pth")
    [line] = faults(folder)
    assert "consolidated.00.pth" in line and "consolidated.01.pth" in line and "tok_embeddings.weight" in line
    exchange(folder / "consolidated.00.pth", folder / "consolidated.01.pth")
    os.truncate(folder / "consolidated.01.pth", 5000)
    [line] = faults(folder)
    assert line.startswith("consolidated.01.pth: has 5000 bytes, not ")
    (folder / "consolidated.01.pth").unlink()
    assert faults(folder) == ["consolidated.01.pth: is missing"]


def test_check_refuses_what_is_not_what_was_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = MODELS["gqa"]
    source = write_meta(tmp_path / "1", config, random_tensors(config), 1)
    write_at = cut.write_at

    def wrong(file: int, content: memoryview, offset: int) -> None:
        write_at(file, bytes([content[0] ^ 1]) + content[1:].tobytes(), offset)

    monkeypatch.setattr(cut, "write_at", wrong)
    with pytest.raises(RunError, match=r"is not what was read: .*weight.* run the same command again"):
        reshard(source, tmp_path / "2", mp=2, check=True)
    assert not (tmp_path / "2").exists()


def test_the_input_is_not_touched_and_nothing_else_is_left(tmp_path: Path) -> None:
    config = MODELS["gqa"]
    source = write_meta(tmp_path / "1", config, random_tensors(config), 1)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in source.iterdir()}
    reshard(source, tmp_path / "2", mp=2)
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in source.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]
    written = ["consolidated.00.pth", "consolidated.01.pth", "manifest.json", "params.json"]
    assert sorted(path.name for path in (tmp_path / "2").iterdir()) == written


def test_no_room_is_said_before_the_first_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = MODELS["gqa"]
    source = write_meta(tmp_path / "1", config, random_tensors(config), 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(RequestError, match=r"needs 0.00 GB, and 0.00 GB are free on that disk: make room"):
        reshard(source, tmp_path / "2", mp=2)
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


# ---- what is said of it ----------------------------------------------------------------------------------------


def test_a_description_tells_files_bytes_memory_and_time(tmp_path: Path) -> None:
    config = MODELS["heads-9-3"]
    path = write_gguf(tmp_path / "m.gguf", config, random_tensors(config), GGMLQuantizationType.F16)
    flags = ReshardFlags(input=path, output=tmp_path / "2", mp=2)
    job = Job.open(flags, check_request(flags))
    text = job.description()
    job.run()
    for file in (tmp_path / "2").iterdir():
        assert file.name == "manifest.json" or re.search(rf"^{file.name} +{file.stat().st_size} bytes$", text, re.M)
    assert "memory" in text and "GB free on that disk" in text and " s on " in text
    padded, tokenizer = job.notes()
    assert padded.startswith("at MP 2, zeros or copies of KV heads fill up the shards (num_heads 9 as 12, ")
    assert tokenizer.startswith("the output has no tokenizer: put one there yourself")
