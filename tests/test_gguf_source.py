"""GGUF files as a source: dequantized slices equal to the gguf package's, of no more blocks than needed."""

import math
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from factory import MODELS, checkpoint, finish_gguf, gguf_name, gguf_writer, random_tensors, write_gguf
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from test_sources import Tensors, check_slices, refusal

from llama_mp.checkpoint.load import open_source
from llama_mp.config import RopeScaling
from llama_mp.errors import RequestError
from llama_mp.layout import Span, global_shapes

Q = GGMLQuantizationType
BLOCKS_OF_32 = replace(MODELS["gqa"], hidden_dim=96)
MHA = {"num_heads": 4, "num_kv_heads": 4, "head_dim": 64}
BLOCKS_OF_256 = replace(MODELS["gqa"], dim=256, hidden_dim=512, vocab_size=9, **MHA)


def random_blocks(kind: Q, shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Rows of random bytes whose fp16 scales are small and finite, for the K-quants: Python cannot quantize them."""
    block, block_bytes = GGML_QUANT_SIZES[kind]
    scales_at = {Q.Q2_K: (80, 82), Q.Q3_K: (108,), Q.Q4_K: (0, 2), Q.Q5_K: (0, 2), Q.Q6_K: (208,)}[kind]
    blocks = rng.integers(0, 256, (shape[0], shape[1] // block, block_bytes), dtype=np.uint8)
    for at in scales_at:
        scales = rng.uniform(0.001, 0.1, blocks.shape[:2]).astype(np.float16)
        blocks[..., at : at + 2] = scales[..., None].view(np.uint8)
    return blocks.reshape(shape[0], -1)


def write_k_quants(path: Path, kind: Q) -> Tensors:
    """A GGUF file of BLOCKS_OF_256; returns its tensors, each dequantized whole by the gguf package."""
    rng, writer, tensors = np.random.default_rng(0), gguf_writer(path, BLOCKS_OF_256), {}
    writer.add_key_length(BLOCKS_OF_256.head_dim)
    for name, shape in global_shapes(BLOCKS_OF_256).items():
        plain = len(shape) == 1
        data = rng.standard_normal(shape, dtype=np.float32) if plain else random_blocks(kind, shape, rng)
        tensors[name] = torch.from_numpy(data if plain else gguf.quants.dequantize(data, kind))
        writer.add_tensor(gguf_name(name), data, raw_dtype=None if plain else kind)
    finish_gguf(writer, path)
    return tensors


@pytest.mark.parametrize("kind", [Q.F32, Q.F16, Q.BF16, Q.Q8_0, Q.Q4_0, Q.Q4_1])
def test_gguf_slices(tmp_path: Path, kind: Q) -> None:
    dtype = {Q.F16: torch.float16, Q.BF16: torch.bfloat16}.get(kind, torch.float32)
    tensors = random_tensors(BLOCKS_OF_32)
    source = open_source(checkpoint(write_gguf(tmp_path / "m.gguf", BLOCKS_OF_32, tensors, kind)))
    for name, tensor in tensors.items():
        if tensor.dim() == 2:
            tensors[name] = torch.from_numpy(
                gguf.quants.dequantize(gguf.quants.quantize(tensor.numpy(), kind), kind)
            ).to(dtype)
    check_slices(source, tensors)
    assert source.precision == {Q.F32: "fp32", Q.BF16: "bf16"}.get(kind, "fp16")
    assert replace(source.config, norm_eps=BLOCKS_OF_32.norm_eps) == BLOCKS_OF_32  # norm_eps: fp32 in the file


@pytest.mark.parametrize("kind", [Q.Q2_K, Q.Q3_K, Q.Q4_K, Q.Q5_K, Q.Q6_K])
def test_gguf_slices_of_k_quants(tmp_path: Path, kind: Q) -> None:
    tensors = write_k_quants(tmp_path / "m.gguf", kind)
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    check_slices(open_source(checkpoint(tmp_path / "m.gguf")), tensors)


def test_gguf_dequantizes_only_the_blocks_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_k_quants(tmp_path / "m.gguf", Q.Q4_K)
    source, sizes = open_source(checkpoint(tmp_path / "m.gguf")), []
    dequantize = gguf.quants.dequantize
    monkeypatch.setattr(
        "llama_mp.checkpoint.gguf.dequantize", lambda b, kind: sizes.append(b.size) or dequantize(b, kind)
    )
    for cols, num_blocks in [((0, 256), 1), ((255, 257), 2), ((256, 512), 1), ((300, 301), 1), ((0, 512), 2)]:
        before = source.bytes_read
        source.read("layers.0.feed_forward.w2.weight", Span(10, 13), Span(*cols))
        assert source.bytes_read - before == sizes.pop() == 3 * num_blocks * 144
    source.read("norm.weight", Span(3, 7), Span(0, 1))
    assert source.bytes_read - before == 3 * 2 * 144 + 4 * 4


def test_gguf_tells_tied_embeddings_and_vocabulary(tmp_path: Path) -> None:
    for tied in (True, False):
        config = replace(BLOCKS_OF_32, tied_embeddings=tied)
        source = open_source(checkpoint(write_gguf(tmp_path / "m.gguf", config, random_tensors(config), Q.F32)))
        assert (source.config.tied_embeddings, source.config.vocab_size) == (tied, 331)


def test_gguf_tensors_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    tensors = random_tensors(BLOCKS_OF_32)
    del tensors["layers.0.attention.wk.weight"]
    tensors["layers.1.attention.wq.bias"] = torch.ones(64)
    tensors["layers.1.feed_forward.w1.weight"] = torch.ones(64, 64)
    said = refusal(write_gguf(tmp_path / "m.gguf", BLOCKS_OF_32, tensors, Q.F32))
    assert "layers.0.attention.wk.weight is missing" in said
    assert "blk.1.attn_q.bias is unknown" in said
    assert "layers.1.feed_forward.w1.weight has shape (64, 64), not (96, 64)" in said


def test_a_quantization_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    writer = gguf_writer(tmp_path / "m.gguf", BLOCKS_OF_256)
    writer.add_key_length(BLOCKS_OF_256.head_dim)
    for name, shape in global_shapes(BLOCKS_OF_256).items():
        kind = Q.Q8_K if len(shape) == 2 else Q.F32
        block, block_bytes = GGML_QUANT_SIZES[kind]
        data = np.zeros((*shape[:-1], shape[-1] // block * block_bytes), dtype=np.uint8)
        writer.add_tensor(gguf_name(name), data, raw_dtype=kind)
    source = open_source(checkpoint(finish_gguf(writer, tmp_path / "m.gguf")))
    with pytest.raises(RequestError, match=r"output.weight is quantized as Q8_K, which cannot be read; use Q8_0"):
        source.read("output.weight", Span(0, 1), Span(0, 256))


# ---- rope factors of Llama 3.1 and later -----------------------------------------------------------------------


def llama_3_factors(theta: float, head_dim: int, factor: float) -> list[float]:
    """What a Llama 3 file divides each frequency by, by wavelength: as its converters write it."""
    result = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * theta ** (i / head_dim)
        if wavelength < 8192 / 4.0:
            result.append(1.0)
        elif wavelength > 8192 / 1.0:
            result.append(factor)
        else:
            smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
            result.append(1 / ((1 - smooth) / factor + smooth))
    return result


def with_factors(path: Path, factors: np.ndarray) -> Path:
    config = replace(BLOCKS_OF_256, rope_theta=500000.0)
    writer = gguf_writer(path, config)
    writer.add_key_length(config.head_dim)
    for name, tensor in random_tensors(config).items():
        writer.add_tensor(gguf_name(name), tensor.numpy())
    writer.add_tensor("rope_freqs.weight", factors)
    return finish_gguf(writer, path)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_rope_factors_give_the_scaling(tmp_path: Path, factor: float) -> None:
    factors = np.array(llama_3_factors(500000.0, 64, factor), dtype=np.float32)
    assert 1 < sorted(set(factors))[1] < factor, "no wavelength is on the ramp"
    source = open_source(checkpoint(with_factors(tmp_path / "m.gguf", factors)))
    assert source.config.rope_scaling == RopeScaling(factor=factor)
    assert "rope_freqs.weight" not in source.names()


LLAMA_3_1 = llama_3_factors(500000.0, 64, 8.0)
STRANGE = {
    "all alike": np.full(32, 2, dtype=np.float32),
    "of another theta": np.array(llama_3_factors(10000.0, 64, 8.0), dtype=np.float32),
    "one off": np.array([*LLAMA_3_1[:-1], 7.9], dtype=np.float32),
    "too few": np.array(LLAMA_3_1[:-1], dtype=np.float32),
    "too many": np.array([*LLAMA_3_1, 8], dtype=np.float32),
    "in fp16": np.array(LLAMA_3_1, dtype=np.float16),
    "zeros": np.zeros(32, dtype=np.float32),
    "not numbers": np.full(32, np.nan, dtype=np.float32),
    "infinite": np.full(32, np.inf, dtype=np.float32),
}


@pytest.mark.parametrize("name", STRANGE)
def test_strange_rope_factors_are_refused(tmp_path: Path, name: str) -> None:
    assert "rope_freqs.weight is not the scaling of Llama 3" in refusal(
        with_factors(tmp_path / "m.gguf", STRANGE[name])
    )
