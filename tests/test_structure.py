"""What a checkpoint without digests tells itself: each kind of fault by file and tensor; whole ones of each kind."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from damage import change, checked, exchange, faults, meta, whole_line
from factory import (
    MODELS,
    VOCAB_SIZE,
    hf_cache,
    hugging_face,
    random_tensors,
    write_gguf,
    write_hf,
)
from gguf.constants import GGMLQuantizationType
from running import ROOT
from safetensors.torch import load_file, save_file

from llama_mp.checkpoint import scan
from llama_mp.errors import RequestError
from llama_mp.layout import shards

VERIFY = ROOT / "launch" / "verify.py"
GQA, PADDED = MODELS["gqa"], MODELS["heads-9-3"]
WK, NORM = "layers.1.attention.wk.weight", "layers.0.ffn_norm.weight"


@pytest.mark.parametrize("mp", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("name", ["mha", "gqa", "heads-9-3"])
def test_whole_meta_folders(tmp_path: Path, name: str, mp: int) -> None:
    folder = meta(tmp_path, mp, MODELS[name])
    num_bytes = sum(file.stat().st_size for file in folder.glob("*.pth"))
    num_tensors = 20 if MODELS[name].tied_embeddings else 21
    assert whole_line(folder) == (
        f"{folder} is whole: {mp} file{'s' if mp > 1 else ''}, {num_tensors} tensors, {num_bytes} bytes; "
        "shapes, copies, padding and finite values; no manifest.json or checklist.chk is there"
    )


@pytest.mark.parametrize("kind", ["hf", "cache", "gguf file", "gguf folder"])
def test_whole_checkpoints_of_other_kinds(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "m"
    if "gguf" in kind:
        path.mkdir()
        config = replace(MODELS["tied"], hidden_dim=96)  # whole blocks
        file = write_gguf(path / "m.gguf", config, random_tensors(config), GGMLQuantizationType.Q8_0)
        path = file if kind == "gguf file" else path
    else:
        write_hf(path, hugging_face(MODELS["tied"]), "100KB")
        path = hf_cache(path, tmp_path / "models--x--y") if kind == "cache" else path
    assert "is whole: " in whole_line(path) and ", 20 tensors, " in whole_line(path)


def test_rope_freqs_are_ignored(tmp_path: Path) -> None:
    folder = meta(tmp_path, 2, GQA)
    for rank in range(2):
        file = folder / f"consolidated.{rank:02d}.pth"
        torch.save(torch.load(file) | {"rope.freqs": torch.tensor([1.0, rank, float("nan")])}, file)
    whole_line(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("chunk_elements", [100, 1 << 20])
def test_values_that_are_not_finite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float, chunk_elements: int
) -> None:
    monkeypatch.setattr(scan, "CHUNK_ELEMENTS", chunk_elements)
    folder = meta(tmp_path, 2, GQA)
    change(folder, 1, "layers.1.feed_forward.w2.weight", (slice(50, 52), 40), value)
    assert faults(folder) == [
        f"consolidated.01.pth: layers.1.feed_forward.w2.weight: 2 not finite, the first at [50, 40]: {value}"
    ]


def test_values_that_are_not_finite_in_safetensors(tmp_path: Path) -> None:
    folder = write_hf(tmp_path, hugging_face(GQA).bfloat16(), "60KB")
    name = "model.layers.1.self_attn.q_proj.weight"
    file = folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors = load_file(file)
    tensors[name][9, 3] = float("nan")
    save_file(tensors, file)
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert faults(folder) == [f"{file.name}: {name}: 1 not finite, the first at [9, 3]: nan"]


def test_values_that_are_not_finite_in_gguf(tmp_path: Path) -> None:
    config = replace(MODELS["tied"], hidden_dim=96)
    tensors = random_tensors(config)
    tensors["norm.weight"][5] = float("inf")
    tensors["layers.1.feed_forward.w2.weight"][3, 40] = float("inf")
    with np.errstate(invalid="ignore"):
        file = write_gguf(tmp_path / "m.gguf", config, tensors, GGMLQuantizationType.Q8_0)
    first, second = sorted(faults(file))
    assert first.startswith("m.gguf: blk.1.ffn_down.weight: 32 not finite, the first at [3, 32]: ")
    assert second == "m.gguf: output_norm.weight: 1 not finite, the first at [5]: inf"


@pytest.mark.parametrize(("mp", "rank", "usual"), [(2, 1, 0), (4, 0, 1), (4, 2, 0)])
def test_a_norm_that_is_not_that_of_the_other_shards(tmp_path: Path, mp: int, rank: int, usual: int) -> None:
    folder = meta(tmp_path, mp, GQA)
    change(folder, rank, NORM, 63, 5.0)
    assert faults(folder) == [
        f"consolidated.{rank:02d}.pth: {NORM}: rows 0 to 63 of the whole tensor differ from those in "
        f"consolidated.{usual:02d}.pth"
    ]


@pytest.mark.parametrize("chunk_elements", [100, 1 << 20])
def test_copies_of_a_kv_head_that_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_elements: int) -> None:
    monkeypatch.setattr(scan, "CHUNK_ELEMENTS", chunk_elements)
    folder = meta(tmp_path, 8, GQA)  # 2 KV heads, each in four shards
    change(folder, 6, WK, (7, 63), 5.0)
    assert faults(folder) == [
        f"consolidated.06.pth: {WK}: rows 8 to 15 of the whole tensor differ from those in consolidated.04.pth"
    ]


def test_two_shards_exchanged_within_the_copies_of_a_head_are_found_by_their_queries_alone(tmp_path: Path) -> None:
    """Without digests nothing tells: the other way to know is a manifest."""
    folder = meta(tmp_path, 4, GQA)
    exchange(folder / "consolidated.00.pth", folder / "consolidated.01.pth")
    assert faults(folder) == []
    exchange(folder / "consolidated.00.pth", folder / "consolidated.02.pth")
    assert {line.split(": ")[1].split(".")[3] for line in faults(folder)} == {"wk", "wv"}


@pytest.mark.parametrize(
    ("mp", "rank", "name", "place"),
    [
        (2, 1, "layers.0.attention.wq.weight", (47, 5)),  # the second rank's second KV group is padding
        (2, 1, "layers.0.attention.wv.weight", (8, 0)),
        (2, 1, "layers.1.attention.wo.weight", (71, 24)),
        (2, 1, "output.weight", (165, 3)),
        (4, 3, "layers.0.feed_forward.w2.weight", (0, 22)),
        (4, 3, "layers.0.feed_forward.w1.weight", (21, 71)),
    ],
)
@pytest.mark.parametrize("chunk_elements", [100, 1 << 20])
def test_padding_that_is_not_zero(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mp: int,
    rank: int,
    name: str,
    place: tuple[int, int],
    chunk_elements: int,
) -> None:
    monkeypatch.setattr(scan, "CHUNK_ELEMENTS", chunk_elements)
    config = replace(PADDED, tied_embeddings=False)
    folder = meta(tmp_path, mp, config)
    assert config.vocab_size == VOCAB_SIZE == 331
    change(folder, rank, name, place, 1e-30)
    assert faults(folder) == [
        f"consolidated.{rank:02d}.pth: {name}: 1 not zero in the padding, the first at {list(place)}"
    ]


def test_regions_that_several_files_hold_are_the_same_regions() -> None:
    """What the check of copies relies on: no two placements of a layout overlap in part."""
    for config in MODELS.values():
        for mp in range(1, config.num_heads + 1):
            held: dict[tuple, int] = {}
            for rank in range(mp):
                for shard in shards(config, rank, mp).values():
                    for p in shard.placements:
                        held[p.source, p.rows, p.cols] = len(p.rows) * len(p.cols)
            whole = random_tensors(config)
            for name, tensor in whole.items():
                assert sum(size for (source, *_), size in held.items() if source == name) == tensor.numel()


# ---- what cannot be opened -------------------------------------------------------------------------------------


def test_every_file_that_is_not_whole_is_named(tmp_path: Path) -> None:
    folder = meta(tmp_path, 4, GQA)
    os.truncate(folder / "consolidated.01.pth", 20_000)
    (folder / "consolidated.03.pth").write_bytes(b"<html>")
    first, second = faults(folder)
    assert first.startswith("consolidated.01.pth: is not a whole torch file (")
    assert second.startswith("consolidated.03.pth: is no file of torch.save")


def test_safetensors_and_gguf_cut_short(tmp_path: Path) -> None:
    folder = write_hf(tmp_path / "hf", hugging_face(GQA), "100KB")
    files = sorted(folder.glob("*.safetensors"))
    for file in files[1:]:
        os.truncate(file, file.stat().st_size - 1)
    assert [line.split(" (")[0] for line in faults(folder)] == [
        f"{file.name}: is not a whole safetensors file" for file in files[1:]
    ]
    file = write_gguf(tmp_path / "m.gguf", MODELS["tied"], random_tensors(MODELS["tied"]), GGMLQuantizationType.F16)
    os.truncate(file, file.stat().st_size - 100)
    [line] = faults(file)
    assert line.startswith("m.gguf: is not a whole GGUF file (tensor ")


def test_wrong_shapes_and_names_are_a_line_each(tmp_path: Path) -> None:
    folder = meta(tmp_path / "m", 2, GQA)
    file = folder / "consolidated.01.pth"
    tensors = torch.load(file, weights_only=True)
    torch.save(tensors | {name: tensors[name][:-1].clone() for name in (WK, NORM)}, file)
    assert sorted(faults(folder)) == [
        f"consolidated.01.pth: {NORM}: has shape (63,), not (64,)",
        f"consolidated.01.pth: {WK}: has shape (7, 64), not (8, 64)",
    ]
    del tensors[NORM]
    torch.save(tensors | {"x.bias": torch.ones(2)}, file)
    assert faults(folder) == [
        f"consolidated.01.pth: {NORM}: is missing here, but in consolidated.00.pth",
        "consolidated.01.pth: x.bias: is not in consolidated.00.pth",
    ]
    for rank in range(2):
        torch.save(tensors | {"x.bias": torch.ones(2)}, folder / f"consolidated.{rank:02d}.pth")
    assert faults(folder) == [f"m: {NORM}: is missing", "m: x.bias: is unknown"]


def test_a_wrong_shape_in_safetensors_names_its_file_and_its_own_name(tmp_path: Path) -> None:
    folder = write_hf(tmp_path / "m", hugging_face(GQA), "100KB")
    name = "model.layers.1.mlp.down_proj.weight"
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    file = folder / index[name]
    tensors = load_file(file)
    tensors[name] = tensors[name][:, 1:].clone()
    save_file(tensors, file)
    assert faults(folder) == [f"{file.name}: {name}: has shape (64, 89), not (64, 90)"]


@pytest.mark.parametrize("dropped", [0, 3])
def test_a_dropped_shard_is_one_line(tmp_path: Path, dropped: int) -> None:
    folder = meta(tmp_path / "m", 4, GQA)
    (folder / f"consolidated.{dropped:02d}.pth").unlink()
    [line] = faults(folder)
    assert line.startswith("m: ") and f"lacks consolidated.{dropped:02d}.pth of 4 shards" in line


def test_what_belongs_to_it_is_missing(tmp_path: Path) -> None:
    folder = meta(tmp_path / "m", 2, GQA)
    (folder / "params.json").rename(tmp_path / "params.json")
    [line] = faults(folder)
    assert line.startswith("m: lacks params.json")
    (folder / "params.json").write_text("{")
    [line] = faults(folder)
    assert line.startswith("m: params.json is not JSON")
    folder = write_hf(tmp_path / "hf", hugging_face(GQA), "100KB")
    [first, *_] = sorted(folder.glob("*.safetensors"))
    first.unlink()
    [line] = faults(folder)
    assert line.startswith(f"hf: lacks {first.name} of the ")


@pytest.mark.parametrize("content", [None, "empty", "x.bin", "x.txt"])
def test_no_checkpoint_at_all_is_a_wrong_request(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "m"
    if content:
        path.mkdir()
    if content and content != "empty":
        path = path / content
        path.write_text("x")
    with pytest.raises(RequestError, match=r"check the path|give the folder"):
        checked(path)
