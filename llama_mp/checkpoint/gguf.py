"""GGUF files: one file, dequantized on reading, and only the rows and blocks of columns that are asked for."""

import re
from dataclasses import replace

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from llama_mp.config import ModelConfig, RopeScaling
from llama_mp.dtypes import narrowest
from llama_mp.errors import RequestError
from llama_mp.gguf_header import TensorInfo, read_header
from llama_mp.layout import Span, matrix_shape
from llama_mp.locate import Checkpoint
from llama_mp.rope import scaled_frequencies

NAMES = {
    "token_embd": "tok_embeddings",
    "output_norm": "norm",
    "output": "output",
    "attn_q": "attention.wq",
    "attn_k": "attention.wk",
    "attn_v": "attention.wv",
    "attn_output": "attention.wo",
    "ffn_gate": "feed_forward.w1",
    "ffn_down": "feed_forward.w2",
    "ffn_up": "feed_forward.w3",
    "attn_norm": "attention_norm",
    "ffn_norm": "ffn_norm",
}
BLOCK_NAME = re.compile(r"blk\.(\d+)\.(\w+)\.weight")
ROPE_FACTORS = "rope_freqs.weight"  # Llama 3.1 and later: what each rotation frequency is divided by
PLAIN = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}


class GGUFSource:
    """Reads slices of a GGUF file's tensors; its q and k rows are in Meta's order already."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        [self.file] = checkpoint.files
        infos = read_header(self.file).tensors
        self.data = np.memmap(self.file, mode="r")
        factors = infos.pop(ROPE_FACTORS, None)
        self.tensors = {meta_name(name): info for name, info in infos.items()}
        kinds = {info.kind for info in self.tensors.values() if len(info.shape) == 2}
        self.precision = narrowest({PLAIN[kind] for kind in kinds}) if kinds <= set(PLAIN) else "fp16"
        self.config = complete(checkpoint.config, self.tensors)
        if factors:
            self.config = replace(self.config, rope_scaling=self.rope_scaling(factors))
        self.bytes_read = 0

    def names(self) -> list[str]:
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return PLAIN.get(self.tensors[name].kind, torch.float32)

    def raw(self, info: TensorInfo) -> np.ndarray:
        return self.data[info.offset : info.offset + info.num_bytes]

    def read(self, name: str, rows: Span, cols: Span) -> torch.Tensor:
        info = self.tensors[name]
        num_rows, num_cols = matrix_shape(info.shape)
        if len(info.shape) == 1:  # a vector lies along the blocks
            rows, cols, num_rows, num_cols = Span(0, 1), rows, 1, info.shape[0]
        block, block_bytes = GGML_QUANT_SIZES[info.kind]
        first, last = cols.start // block, -(-cols.stop // block)
        blocks = self.raw(info).reshape(num_rows, num_cols // block * block_bytes)
        blocks = blocks[rows.start : rows.stop, first * block_bytes : last * block_bytes]
        self.bytes_read += blocks.size
        values = self.values(name, info, blocks)[:, cols.start - first * block : cols.stop - first * block]
        return values[0] if len(info.shape) == 1 else values

    def values(self, name: str, info: TensorInfo, blocks: np.ndarray) -> torch.Tensor:
        """The elements of `blocks` (bytes [rows, n]) in the type that `dtype` says."""
        if info.kind in PLAIN:
            return torch.from_numpy(np.array(blocks)).view(PLAIN[info.kind])
        try:
            with np.errstate(all="ignore"):  # numpy would warn of infinite scales; who reads sees the values
                return torch.from_numpy(dequantize(np.ascontiguousarray(blocks), info.kind))
        except NotImplementedError as error:
            raise RequestError(
                f"{self.file}: {name} is quantized as {info.kind.name}, which cannot be read; "
                "use Q8_0, Q4_0, Q4_1 or a K-quant"
            ) from error

    def rope_scaling(self, info: TensorInfo) -> RopeScaling:
        """The scaling whose divisors of the frequencies `info` holds; Llama 3's other constants are the defaults."""
        if info.kind == GGMLQuantizationType.F32 and info.shape == (self.config.head_dim // 2,):
            factors = self.raw(info).view(np.float32)
            if 1 <= factors.max() < np.inf:
                scaling = RopeScaling(factor=float(factors.max()))
                plain = scaled_frequencies(replace(self.config, rope_scaling=None))
                expected = plain / scaled_frequencies(replace(self.config, rope_scaling=scaling))
                if np.allclose(expected.numpy(), factors, rtol=1e-3):
                    return scaling
        raise RequestError(f"{self.file}: {ROPE_FACTORS} is not the scaling of Llama 3, the only one supported")


def meta_name(name: str) -> str:
    """Meta's name of a GGUF tensor; a name that is not known stays as it is, for the check to list."""
    block = BLOCK_NAME.fullmatch(name)
    if block and block[2] in NAMES:
        return f"layers.{block[1]}.{NAMES[block[2]]}.weight"
    stem = name.removesuffix(".weight")
    return f"{NAMES[stem]}.weight" if stem in NAMES else name


def complete(config: ModelConfig, tensors: dict[str, TensorInfo]) -> ModelConfig:
    """`config` with what only the tensors tell: vocabulary and tied embeddings."""
    embeddings = tensors.get("tok_embeddings.weight")
    vocab_size = config.vocab_size or (embeddings.shape[0] if embeddings else 0)
    return replace(config, vocab_size=vocab_size, tied_embeddings="output.weight" not in tensors)
