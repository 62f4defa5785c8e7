"""Hugging Face's folders: `model.safetensors`, or several files that an index names."""

import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from llama_mp.checkpoint.source import listed
from llama_mp.dtypes import narrowest
from llama_mp.errors import RequestError
from llama_mp.layout import Span
from llama_mp.locate import Checkpoint

NAMES = {
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}
BLOCK_NAME = re.compile(r"model\.(layers\.\d+)\.(.+)")
IGNORED = "rotary_emb.inv_freq"  # transformers below 4.31 kept the rotation frequencies; they follow from the config
IN_HALVES = ("attention.wq.weight", "attention.wk.weight")
MAX_HEADER_BYTES = 1 << 24  # 10,000 tensors have 1.5 MB
TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class HFSource:
    """Reads slices of the memory-mapped files. Rows of q and k come in Meta's order, whichever are asked for."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.config = checkpoint.config
        self.tensors: dict[str, torch.Tensor] = {}
        for file in checkpoint.files:
            for hf_name, tensor in open_file(file).items():
                if self.tensors.setdefault(meta_name(hf_name), tensor) is not tensor:
                    raise RequestError(
                        f"{file}: {hf_name} is there twice; check that all its files come from one download"
                    )
        if self.config.tied_embeddings:  # declared: a copy that some tools store beside them says nothing more
            self.tensors.pop("output.weight", None)
        self.precision = narrowest({tensor.dtype for tensor in self.tensors.values() if tensor.dim() == 2})
        self.bytes_read = 0

    def names(self) -> list[str]:
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def read(self, name: str, rows: Span, cols: Span) -> torch.Tensor:
        tensor = self.tensors[name]
        if tensor.dim() == 2:
            tensor = tensor[:, slice(*cols)]
        if name.endswith(IN_HALVES):
            part = tensor.index_select(0, rows_in_halves(rows, self.config.head_dim))
        else:
            part = tensor[slice(*rows)]
        self.bytes_read += part.numel() * part.element_size()
        return part


def rows_in_halves(rows: Span, head_dim: int) -> torch.Tensor:
    """Where the given rows of Meta's wq or wk stand in Hugging Face's: pair i of a head is (i, i + head_dim / 2)."""
    row = torch.arange(*rows)
    in_head = row % head_dim
    return row - in_head + in_head // 2 + in_head % 2 * (head_dim // 2)


def meta_name(hf_name: str) -> str:
    """Meta's name of a Hugging Face tensor; a name that is not known stays as it is, for the check to list."""
    stem, _, kind = hf_name.rpartition(".")
    block = BLOCK_NAME.fullmatch(stem)
    if kind != "weight" or (block[2] if block else stem) not in NAMES:
        return hf_name
    return f"{block[1]}.{NAMES[block[2]]}.weight" if block else f"{NAMES[stem]}.weight"


def hf_name(name: str) -> str:
    """Hugging Face's name of a tensor in Meta's."""
    own_names = {own: hf for hf, own in NAMES.items()}
    block = re.fullmatch(r"(layers\.\d+)\.(.+)\.weight", name)
    return (
        f"model.{block[1]}.{own_names[block[2]]}.weight"
        if block
        else f"{own_names[name.removesuffix('.weight')]}.weight"
    )


def open_file(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of one file, as views of its mapping: none of their bytes is read yet.

    Raises RequestError for a file that is not whole, and for tensors that are not of a plain float type."""
    check_header(file)
    try:
        with safe_open(file, framework="pt") as opened:
            held = opened.keys()
            names = [name for name in held if not name.endswith(IGNORED)]
            kinds = {name: opened.get_slice(name).get_dtype() for name in names}
            faults = [f"{name} is {kind}" for name, kind in kinds.items() if kind not in TYPES]
            if faults:
                raise RequestError(f"{file}: {listed(faults)}, but only {', '.join(TYPES)} are read")
            return {name: opened.get_tensor(name) for name in names}
    except MemoryError as error:
        raise RequestError(f"{file} does not fit the address space: raise the limit (ulimit -v)") from error
    except (SafetensorError, OSError) as error:
        raise RequestError(f"{file} is not a whole safetensors file ({error}); download it again") from error


def check_header(file: Path) -> None:
    """Raise RequestError where the length of the header, which stands before it, is no such length. The library would
    believe 100 MB, and take a multiple of that for what is in them."""
    try:
        with file.open("rb") as opened:
            head = opened.read(8)
    except OSError as error:
        raise RequestError(f"{file} cannot be read: {error.strerror}") from error
    length = int.from_bytes(head, "little")
    if len(head) < 8 or length > MAX_HEADER_BYTES:
        # eight bytes without a zero are the beginning of something else, such as a page
        begins = f"; it begins with {head!r}" if b"\0" not in head else ""
        fault = f"header too large: {length} bytes" if len(head) == 8 else "header too small"
        raise RequestError(f"{file} is not a whole safetensors file ({fault}{begins}); download it again")
