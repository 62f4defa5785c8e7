"""Two checkpoints element by element: equal over degrees and formats, and every difference named with its place."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from factory import MODELS, checkpoint, hugging_face, meta_tensors, random_tensors, write_gguf, write_hf, write_meta
from gguf.constants import GGMLQuantizationType

from llama_mp.checkpoint import scan
from llama_mp.checkpoint.compare import compare
from llama_mp.checkpoint.load import open_source
from llama_mp.checkpoint.source import Source
from llama_mp.config import ModelConfig

CONFIG = MODELS["heads-9-3"]
WQ, WO, W2 = (f"layers.1.{name}.weight" for name in ("attention.wq", "attention.wo", "feed_forward.w2"))


@pytest.fixture(autouse=True)
def chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks in the tiny matrices, the last one smaller."""
    monkeypatch.setattr(scan, "CHUNK_ELEMENTS", 2000)


def meta(folder: Path, tensors: dict[str, torch.Tensor], mp: int, config: ModelConfig = CONFIG) -> Source:
    return open_source(checkpoint(write_meta(folder, config, tensors, mp)))


def told(ours: Source, theirs: Source, **options: object) -> list[str]:
    return list(map(str, compare(ours, theirs, **options)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["mha", "gqa", "heads-9-3"])
def test_equal_over_degrees(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    tensors = random_tensors(MODELS[name], dtype)
    sources = [meta(tmp_path / str(mp), tensors, mp, MODELS[name]) for mp in (1, 3, 8)]
    for ours in sources:
        assert told(ours, sources[0]) == told(sources[0], ours) == []


@pytest.mark.parametrize("chunk_elements", [1, 300, 1 << 20])
def test_chunks_of_any_size_tell_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_elements: int) -> None:
    monkeypatch.setattr(scan, "CHUNK_ELEMENTS", chunk_elements)
    tensors = random_tensors(CONFIG)
    theirs = meta(tmp_path / "theirs", tensors, 2)
    assert told(meta(tmp_path / "same", tensors, 1), theirs) == []
    tensors[WO][33, 44:46] = 2.0
    [said] = told(meta(tmp_path / "ours", tensors, 1), theirs)
    assert said.startswith(f"{WO}: 2 of 5184 elements differ, the first at [33, 44], 2.0, not ")


@pytest.mark.parametrize("name", ["gqa", "tied"])
def test_equal_over_formats(tmp_path: Path, name: str) -> None:
    config, model = MODELS[name], hugging_face(MODELS[name])
    tensors = meta_tensors(model)
    sources = [
        meta(tmp_path / "meta", tensors, 3, config),
        open_source(checkpoint(write_hf(tmp_path / "hf", model, "100KB"))),
        open_source(checkpoint(write_gguf(tmp_path / "m.gguf", config, tensors, GGMLQuantizationType.F32))),
    ]
    for ours in sources:
        for theirs in sources:
            assert told(ours, theirs) == []


@pytest.mark.parametrize("mp", [1, 4])
def test_a_difference_names_place_values_and_number(tmp_path: Path, mp: int) -> None:
    tensors = random_tensors(CONFIG)
    theirs = meta(tmp_path / "theirs", tensors, 2)
    ours = {name: tensor.clone() for name, tensor in tensors.items()}
    for name, places in {WQ: [(71, 3), (71, 70)], WO: [(5, 9)], W2: [(71, 89)]}.items():
        tensors[name][places[0]] = 1.5
        for place in places:
            ours[name][place] = 2.5
    ours["norm.weight"][7] = -ours["norm.weight"][7]
    theirs = meta(tmp_path / "theirs", tensors, 2)
    norm = tensors["norm.weight"][7].item()
    assert sorted(told(meta(tmp_path / "ours", ours, mp), theirs)) == [
        f"{WO}: 1 of 5184 elements differ, the first at [5, 9], 2.5, not 1.5",
        f"{WQ}: 2 of 5184 elements differ, the first at [71, 3], 2.5, not 1.5",
        f"{W2}: 1 of 6480 elements differ, the first at [71, 89], 2.5, not 1.5",
        f"norm.weight: 1 of 72 elements differ, the first at [7], {-norm!r}, not {norm!r}",
    ]


def test_bits_are_compared_not_values(tmp_path: Path) -> None:
    tensors = random_tensors(CONFIG)
    tensors[WQ][3, 4], tensors[WO][2, 2] = math.nan, 0.0
    theirs = meta(tmp_path / "theirs", tensors, 2)
    assert told(meta(tmp_path / "same", tensors, 3), theirs) == []
    tensors[WO][2, 2] = -0.0
    tensors[WQ].view(torch.int32)[3, 4] += 1
    assert sorted(told(meta(tmp_path / "ours", tensors, 3), theirs)) == [
        f"{WO}: 1 of 5184 elements differ, the first at [2, 2], -0.0, not 0.0",
        f"{WQ}: 1 of 5184 elements differ, the first at [3, 4], nan, not nan with those bits",
    ]


def test_a_row_moved_to_another_place_is_found(tmp_path: Path) -> None:
    tensors = random_tensors(CONFIG)
    theirs = meta(tmp_path / "theirs", tensors, 2)
    tensors["tok_embeddings.weight"] = tensors["tok_embeddings.weight"].roll(1, 0)
    [said] = told(meta(tmp_path / "ours", tensors, 2), theirs)
    assert said.startswith("tok_embeddings.weight: 23832 of 23832 elements differ, the first at [0, 0], ")


def test_missing_names_and_other_architectures(tmp_path: Path) -> None:
    untied = replace(CONFIG, tied_embeddings=False, rope_theta=500000.0)
    tied = meta(tmp_path / "tied", random_tensors(CONFIG), 2)
    other = meta(tmp_path / "untied", random_tensors(untied) | random_tensors(CONFIG), 2, untied)
    assert told(tied, other) == [
        "the configuration has rope_theta 10000.0, not 500000.0",
        "output.weight: is missing",
    ]
    assert told(other, tied) == [
        "the configuration has rope_theta 500000.0, not 10000.0",
        "output.weight: is not in the other",
    ]


def test_other_shapes_are_told_and_the_rest_is_compared(tmp_path: Path) -> None:
    wider = replace(CONFIG, hidden_dim=92, num_layers=1)
    tensors = random_tensors(wider)
    kept = {name: tensor.clone() for name, tensor in tensors.items() if "feed_forward" not in name}
    theirs = random_tensors(replace(CONFIG, num_layers=1)) | kept
    tensors["norm.weight"][0] += 1
    said = told(
        meta(tmp_path / "ours", tensors, 2, wider), meta(tmp_path / "theirs", theirs, 2, replace(CONFIG, num_layers=1))
    )
    assert said[0] == "the configuration has hidden_dim 92, not 90"
    assert [line.split(":")[0] for line in said[1:]] == [
        *(f"layers.0.feed_forward.{name}.weight" for name in ("w1", "w3", "w2")),
        "norm.weight",
    ]
    assert said[1] == "layers.0.feed_forward.w1.weight: has shape (92, 72), not (90, 72)"


def test_types_are_compared_or_converted(tmp_path: Path) -> None:
    tensors = random_tensors(CONFIG)
    halves = {name: tensor.half() for name, tensor in tensors.items()}
    ours, theirs = meta(tmp_path / "ours", halves, 2), meta(tmp_path / "theirs", tensors, 3)
    assert told(ours, theirs) == [
        "tok_embeddings.weight: is, with 19 other tensors, float16, not float32: not compared"
    ]
    assert told(ours, theirs, dtype_of=lambda name: torch.float16) == []
    assert told(ours, theirs, dtype_of=lambda name: torch.bfloat16) == [
        "tok_embeddings.weight: is, with 19 other tensors, float16, not bfloat16: not compared"
    ]
    halves["norm.weight"] = tensors["norm.weight"]
    mixed = meta(tmp_path / "mixed", halves, 2)
    assert told(mixed, theirs, dtype_of=lambda name: torch.float32 if name == "norm.weight" else torch.float16) == []
    halves[WQ][0, 0] = torch.nextafter(halves[WQ][0, 0], torch.tensor(9.0, dtype=torch.float16))
    [said] = told(meta(tmp_path / "off", halves, 2), theirs, dtype_of=mixed.dtype)
    assert said.startswith(f"{WQ}: 1 of 5184 elements differ, the first at [0, 0], ")


def test_progress_ends_with_all_bytes(tmp_path: Path) -> None:
    tensors = random_tensors(CONFIG)
    calls: list[tuple[int, int]] = []
    source = meta(tmp_path, tensors, 2)
    assert list(compare(source, source, on_progress=lambda done, total: calls.append((done, total)))) == []
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert calls[-1] == (total, total) and len(calls) == len(tensors)


def test_params_json_of_another_head_count_is_a_difference(tmp_path: Path) -> None:
    """The same bytes, understood otherwise."""
    tensors = random_tensors(MODELS["mha"])
    theirs = meta(tmp_path / "theirs", tensors, 1, MODELS["mha"])
    meta(tmp_path / "ours", tensors, 1, MODELS["mha"])
    file = tmp_path / "ours" / "params.json"
    params = json.loads(file.read_text())
    params |= {"n_heads": 4, "n_kv_heads": 4, "llama_mp": params["llama_mp"] | {"head_dim": 16}}
    file.write_text(json.dumps(params))
    said = told(open_source(checkpoint(tmp_path / "ours")), theirs)
    assert said == [
        f"the configuration has {text}"
        for text in ("num_heads 4, not 8", "num_kv_heads 4, not 8", "head_dim 16, not 8")
    ]
