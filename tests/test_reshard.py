"""There and back over every degree and format, bit for bit; and the oracle's own loader on what was written."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from factory import MODELS, checkpoint, random_tensors, write_meta
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama_mp.checkpoint import cut
from llama_mp.checkpoint.load import open_source
from llama_mp.checkpoint.reshard import Job
from llama_mp.config import ModelConfig
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


def files(folder: Path, pattern: str = "*") -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob(pattern)}


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


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    config=st.sampled_from(SHAPES),
    axis=st.sampled_from([0, 1]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    degrees=st.tuples(*[st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8, 16])] * 2),
    chunk=st.sampled_from([1, 1000, 1 << 21]),
)
def test_a_detour_over_any_degree_gives_the_same_tensors(
    tmp_path_factory: pytest.TempPathFactory, config: ModelConfig, axis: int, dtype: torch.dtype, degrees, chunk: int
) -> None:
    n, m = (min(degree, config.num_heads) for degree in degrees)
    folder = tmp_path_factory.mktemp("detour")
    config = replace(config, embedding_axis=axis)
    source = write_meta(folder / "n", config, random_tensors(config, dtype), n)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cut, "CHUNK_ELEMENTS", chunk)
        reshard(source, folder / "m", mp=m)
        reshard(folder / "m", folder / "back", mp=n)
    for ours, theirs in zip(shard_tensors(folder / "back"), shard_tensors(source), strict=True):
        assert same_bits(ours, theirs)
    shutil.rmtree(folder)
