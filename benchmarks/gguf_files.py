"""GGUF files for the comparison with llama.cpp: both sides read the same weights."""

import ctypes
from pathlib import Path

import gguf
import numpy as np
import torch

SHAPE = {"layers": 22, "dim": 2048, "heads": 32, "kv_heads": 4, "hidden": 5632, "vocab": 32000}  # 1.1B parameters
DEVIATION = 0.02


def write_random(path: Path) -> None:
    """A model of SHAPE with random bf16 weights, and without a tokenizer."""
    writer, generator = gguf.GGUFWriter(path, "llama"), torch.Generator().manual_seed(0)
    dim, hidden, head_dim = SHAPE["dim"], SHAPE["hidden"], SHAPE["dim"] // SHAPE["heads"]
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(SHAPE["vocab"])
    writer.add_context_length(2048)
    writer.add_embedding_length(dim)
    writer.add_block_count(SHAPE["layers"])
    writer.add_feed_forward_length(hidden)
    writer.add_head_count(SHAPE["heads"])
    writer.add_head_count_kv(SHAPE["kv_heads"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(head_dim)
    block = {"attn_q": (dim, dim), "attn_k": (SHAPE["kv_heads"] * head_dim, dim), "attn_output": (dim, dim)}
    block |= {"attn_v": block["attn_k"], "ffn_gate": (hidden, dim), "ffn_up": (hidden, dim), "ffn_down": (dim, hidden)}
    shapes = {"token_embd": (SHAPE["vocab"], dim), "output": (SHAPE["vocab"], dim), "output_norm": (dim,)}
    for layer in range(SHAPE["layers"]):
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
        shapes |= {f"blk.{layer}.{name}": (dim,) for name in ("attn_norm", "ffn_norm")}
    for name, shape in shapes.items():
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
            continue
        matrix = (torch.randn(shape, generator=generator) * DEVIATION).bfloat16().view(torch.uint8).numpy()
        writer.add_tensor(f"{name}.weight", matrix, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def requantize(source: Path, target: Path, kind: str) -> None:
    """`source` in another type, "bf16", "q8_0" or "q4_0", by llama.cpp itself."""
    import llama_cpp

    kinds = {
        "bf16": llama_cpp.LLAMA_FTYPE_MOSTLY_BF16,
        "q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
        "q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
    }
    quiet = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p())
    wanted = llama_cpp.llama_model_quantize_default_params()
    wanted.ftype, wanted.allow_requantize = kinds[kind], True
    failed = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(wanted))
    assert not failed, f"llama.cpp could not make {target}"
