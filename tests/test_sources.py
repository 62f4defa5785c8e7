"""Meta's folders as a source: the slices of the global tensors at any degree, and every way of not being one."""

import json
import os
import pickle
import random
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from factory import MODELS, checkpoint, random_tensors, write_meta

from llama_mp.checkpoint.load import open_source
from llama_mp.checkpoint.meta import open_shard
from llama_mp.checkpoint.source import Source
from llama_mp.errors import RequestError
from llama_mp.layout import Span, matrix_shape
from llama_mp.params_json import params_of

Tensors = dict[str, torch.Tensor]
# 9 heads over 3 KV heads: padded at 2, 4 and 8; dim 72 divides by all of them, so that embeddings split on both axes.
ODD = replace(MODELS["heads-9-3"], tied_embeddings=False)


def refusal(path: Path) -> str:
    with pytest.raises(RequestError) as caught:
        open_source(checkpoint(path))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def random_span(rng: random.Random, length: int) -> Span:
    start, stop = sorted(rng.sample(range(length + 1), 2))
    return Span(start, stop)


def check_slices(source: Source, tensors: Tensors, num_regions: int = 4) -> None:
    """Random regions of every tensor, and each tensor whole, are the slices of `tensors`; the bytes are counted."""
    rng = random.Random(0)
    assert set(source.names()) == set(tensors)
    for name, tensor in tensors.items():
        assert (source.shape(name), source.dtype(name)) == (tuple(tensor.shape), tensor.dtype)
        num_rows, num_cols = matrix_shape(tuple(tensor.shape))
        regions = [(random_span(rng, num_rows), random_span(rng, num_cols)) for _ in range(num_regions)]
        for rows, cols in [(Span(0, num_rows), Span(0, num_cols)), *regions]:
            expected = tensor[slice(*rows)] if tensor.dim() == 1 else tensor[slice(*rows), slice(*cols)]
            read = source.read(name, rows, cols)
            assert read.dtype == tensor.dtype
            assert torch.equal(read, expected), f"{name}[{rows}, {cols}]"


# ---- Meta ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("mp", [1, 2, 3, 4, 8])
def test_meta_slices_at_every_degree(tmp_path: Path, mp: int, axis: int) -> None:
    config = replace(ODD, embedding_axis=axis)
    tensors = random_tensors(config, torch.bfloat16)
    source = open_source(checkpoint(write_meta(tmp_path, config, tensors, mp)))
    assert source.config == replace(config, embedding_axis=0 if mp == 1 else axis)  # one shard tells no axis
    check_slices(source, tensors)


def test_meta_reads_no_more_than_asked_for(tmp_path: Path) -> None:
    source = open_source(checkpoint(write_meta(tmp_path, ODD, random_tensors(ODD, torch.float16), 2)))
    source.read("layers.0.feed_forward.w2.weight", Span(3, 10), Span(20, 80))
    source.read("norm.weight", Span(0, 72), Span(0, 1))
    assert source.bytes_read == 2 * (7 * 60 + 72)


@pytest.mark.parametrize(
    ("matrices", "precision"),
    [(torch.float16, "fp16"), (torch.bfloat16, "bf16"), (torch.float32, "fp32"), (None, "fp32")],
)
def test_meta_precision(tmp_path: Path, matrices: torch.dtype | None, precision: str) -> None:
    """Vectors do not count; a mixture (None) needs fp32."""
    tensors = random_tensors(ODD, matrices or torch.float16)
    tensors = {name: t.float() if t.dim() == 1 else t for name, t in tensors.items()}
    if matrices is None:
        tensors["output.weight"] = tensors["output.weight"].bfloat16()
    torch.save(tensors, tmp_path / "consolidated.00.pth")
    (tmp_path / "params.json").write_text(json.dumps(params_of(ODD, mp=1, embedding_axis=0)))
    assert open_source(checkpoint(tmp_path)).precision == precision


@pytest.mark.parametrize(("mp", "axis"), [(1, 1), (2, 1), (4, 1), (2, 0), (4, 0)])
@pytest.mark.parametrize("tied", [False, True])
def test_what_params_json_leaves_out_comes_from_the_tensors(tmp_path: Path, mp: int, axis: int, tied: bool) -> None:
    config = replace(MODELS["mha"], vocab_size=332, embedding_axis=axis, tied_embeddings=tied)
    tensors = random_tensors(config)
    folder = write_meta(tmp_path, config, tensors, mp)
    params = json.loads((folder / "params.json").read_text())
    del params["llama_mp"]
    (folder / "params.json").write_text(json.dumps(params | {"vocab_size": -1}))
    source = open_source(checkpoint(folder))
    assert (source.config.vocab_size, source.config.tied_embeddings) == (332, tied)
    assert source.config.embedding_axis == (0 if mp == 1 else axis)
    check_slices(source, tensors, 1)


def rewrite(folder: Path, ranks: range, change: object) -> None:
    for rank in ranks:
        file = folder / f"consolidated.{rank:02d}.pth"
        tensors = torch.load(file, weights_only=True)
        change(tensors)
        torch.save(tensors, file)


def test_rope_freqs_are_known_and_ignored(tmp_path: Path) -> None:
    tensors = random_tensors(ODD)
    write_meta(tmp_path, ODD, tensors, 2)
    rewrite(tmp_path, range(2), lambda held: held.update({"rope.freqs": torch.ones(4)}))
    check_slices(open_source(checkpoint(tmp_path)), tensors, 1)


def test_missing_and_unknown_tensors_are_listed_in_one_line(tmp_path: Path) -> None:
    write_meta(tmp_path, ODD, random_tensors(ODD), 2)

    def change(held: Tensors) -> None:
        del held["norm.weight"], held["layers.1.attention.wo.weight"]
        held["layers.1.attention.wq.bias"] = torch.ones(3)

    rewrite(tmp_path, range(2), change)
    said = refusal(tmp_path)
    for fault in ("layers.1.attention.wo.weight is missing", "norm.weight is missing", "wq.bias is unknown"):
        assert fault in said


def test_a_long_list_is_cut_and_counted(tmp_path: Path) -> None:
    write_meta(tmp_path, ODD, random_tensors(ODD), 1)
    (tmp_path / "params.json").write_text(json.dumps(params_of(replace(ODD, num_layers=3), mp=1, embedding_axis=0)))
    said = refusal(tmp_path)
    assert said.count(" is missing") == 5
    assert "; and 4 more; check that all its files come from one download" in said


@pytest.mark.parametrize("name", ["layers.1.feed_forward.w2.weight", "tok_embeddings.weight", "norm.weight"])
def test_a_wrong_shape_is_named_with_the_right_one(tmp_path: Path, name: str) -> None:
    write_meta(tmp_path, ODD, random_tensors(ODD), 2)
    rewrite(tmp_path, range(1, 2), lambda held: held.update({name: held[name][:-1].clone()}))
    said = refusal(tmp_path)
    assert said.startswith(f"{tmp_path} at MP 2: consolidated.01.pth: {name} has shape (")
    assert "), not (" in said


def test_shards_of_two_models(tmp_path: Path) -> None:
    write_meta(tmp_path, ODD, random_tensors(ODD), 2)
    rewrite(tmp_path, range(1, 2), lambda held: held.pop("output.weight"))
    assert "hold different tensors (output.weight): check that" in refusal(tmp_path)
    other = replace(ODD, hidden_dim=100)
    write_meta(tmp_path / "b", other, random_tensors(other), 2)
    write_meta(tmp_path, ODD, random_tensors(ODD), 2)
    (tmp_path / "b" / "consolidated.01.pth").rename(tmp_path / "consolidated.01.pth")
    assert "consolidated.01.pth: layers.0.feed_forward.w1.weight has shape (50, 72), not (45, 72)" in refusal(tmp_path)


@pytest.mark.parametrize("hidden_dim", [96, 90])  # 90 over 8 and 4 shards is padded
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("mp", "left"), [(8, 7), (8, 4), (4, 1), (2, 1)])
def test_the_last_shards_missing_is_said_to_be_that(
    tmp_path: Path, hidden_dim: int, axis: int, mp: int, left: int
) -> None:
    config = replace(MODELS["mha"], embedding_axis=axis, hidden_dim=hidden_dim)
    write_meta(tmp_path, config, random_tensors(config), mp)
    for rank in range(left, mp):
        (tmp_path / f"consolidated.{rank:02d}.pth").unlink()
    assert f"lacks consolidated.{left:02d}.pth" in refusal(tmp_path)  # a folder of ours says its degree
    params = json.loads((tmp_path / "params.json").read_text())
    del params["llama_mp"]["shards"]  # Meta's does not
    (tmp_path / "params.json").write_text(json.dumps(params))
    assert f"the tensors are those of {mp} shards, and {left} are here: check that params.json" in refusal(tmp_path)


# ---- files that are no shards ----------------------------------------------------------------------------------


class RunsCode:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch '{self.marker}'",)


def shard_refusal(file: Path) -> str:
    with pytest.raises(RequestError) as caught:
        open_shard(file)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(file))
    return str(caught.value)


def test_a_pickle_that_would_run_code_does_not(tmp_path: Path) -> None:
    file, marker = tmp_path / "consolidated.00.pth", tmp_path / "marker"
    torch.save({"norm.weight": torch.ones(3), "x": RunsCode(marker)}, file)
    said = shard_refusal(file)
    assert "would run code when loaded" in said
    assert "system" in said, "the culprit is named"
    torch.save({"x": RunsCode(marker)}, file, _use_new_zipfile_serialization=False)
    shard_refusal(file)
    file.write_bytes(pickle.dumps(RunsCode(marker)))
    shard_refusal(file)
    assert not marker.exists()
    pickle.loads(file.read_bytes())
    assert marker.exists(), "the pickle was harmless, so the test showed nothing"


def test_files_of_other_kinds(tmp_path: Path) -> None:
    file = tmp_path / "consolidated.00.pth"
    for content in (b"", b"<!DOCTYPE html><p>Log in</p>", b"version https://git-lfs.github.com/spec/v1\n"):
        file.write_bytes(content)
        assert f"it begins with {content[:4]!r}" in shard_refusal(file)
    torch.save({"norm.weight": torch.ones(3)}, file, _use_new_zipfile_serialization=False)
    assert "torch 1.6 or later" in shard_refusal(file)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("readme.txt", "no tensors")
    assert "is not a whole torch file" in shard_refusal(file)
    for value, words in [
        ([torch.ones(3)], "holds a list, not a dictionary"),
        ({"norm.weight": 3.0}, "norm.weight is neither a vector nor a matrix"),
        ({"norm.weight": torch.tensor(3.0)}, "norm.weight is neither a vector nor a matrix"),
    ]:
        torch.save(value, file)
        assert words in shard_refusal(file)


def test_a_shard_cut_anywhere_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "consolidated.00.pth"
    torch.save({"norm.weight": torch.ones(1000)}, file)
    content = file.read_bytes()
    for length in (*range(0, len(content), 101), len(content) - 1):
        file.write_bytes(content[:length])
        shard_refusal(file)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_damaged_pickle_gives_tensors_or_a_refusal(tmp_path: Path) -> None:
    """The archive's checksums are right: what torch's unpickler itself makes of nonsense."""
    rng, file = random.Random(0), tmp_path / "consolidated.00.pth"
    torch.save({"norm.weight": torch.ones(5), "output.weight": torch.ones(4, 5)}, file)
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    [pickled] = [name for name in members if name.endswith("data.pkl")]
    num_refused = 0
    for _ in range(300):
        changed = bytearray(members[pickled])
        changed[rng.randrange(len(changed))] = rng.randrange(256)
        with zipfile.ZipFile(file, "w") as archive:
            for name, content in (members | {pickled: bytes(changed)}).items():
                archive.writestr(name, content)
        try:
            open_shard(file)
        except RequestError:
            num_refused += 1
    assert num_refused > 200
