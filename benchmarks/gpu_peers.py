"""A peer of benchmarks/gpu.py: a process that makes random weights on the device, decodes greedily, batch 1, and ends
with a line of JSON.

    python benchmarks/gpu_peers.py gpt_fast|hugging_face '{"size": "7B", "device": "cuda", "quant": "none", ...}'

gpt_fast needs a checkout of it, "folder": its own model, quantized layers and step are taken, compiled as it compiles
them. Hugging Face generates with its static cache, and compiles the step by itself. On a CPU neither compiles.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from contender import hugging_face_model
from torch import nn

from llama_mp.ceiling import synchronize
from llama_mp.config import load_size
from llama_mp.machine import choose_device
from llama_mp.measure import REPETITIONS

INT4_GROUP = 32  # as ours; gpt-fast's own default is 128
SCALE = 1e-4  # of gpt-fast's codes


class Taken(NamedTuple):
    """Seconds of one answer: of its prompt, and of the tokens after the first."""

    prefill_s: float
    decode_s: float


def gpt_fast(
    device: torch.device, size: str, prompt_len: int, gen_len: int, folder: str, quant: str
) -> Callable[[], Taken]:
    sys.path.insert(0, folder)
    import generate as theirs

    model = gpt_fast_model(device, size, quant)
    with torch.device(device):
        model.setup_caches(max_batch_size=1, max_seq_length=prompt_len + gen_len)
    if device.type == "cuda":
        theirs.decode_one_token = torch.compile(theirs.decode_one_token, mode="reduce-overhead", fullgraph=True)
    prompt = torch.randint(0, 1024, (1, prompt_len), device=device)
    greedy = {"temperature": 0.0, "top_k": None}

    @torch.no_grad()
    def run() -> Taken:
        start = now(device)
        token = theirs.prefill(model, prompt, torch.arange(prompt_len, device=device), **greedy).clone()
        prefilled = now(device)
        position = torch.tensor([prompt_len], device=device, dtype=torch.int)
        theirs.decode_n_tokens(model, token.view(1, -1), position, gen_len - 1, **greedy)
        return Taken(prefilled - start, now(device) - prefilled)

    return run


def gpt_fast_model(device: torch.device, size: str, quant: str) -> nn.Module:
    """Its Transformer in the shape of `size`."""
    import model as theirs

    shape = load_size(size)
    arguments = theirs.ModelArgs(
        block_size=shape.context_length,
        vocab_size=shape.vocab_size,
        n_layer=shape.num_layers,
        n_head=shape.num_heads,
        n_local_heads=shape.num_kv_heads,
        dim=shape.dim,
        intermediate_size=shape.hidden_dim,
        rope_base=shape.rope_theta,
        norm_eps=shape.norm_eps,
    )
    with torch.device("meta"):
        model = theirs.Transformer(arguments).bfloat16()
        if quant != "none":
            model = quantized(model, quant)
    model = model.to_empty(device=device).eval().requires_grad_(False)
    fill(model)
    return model


def quantized(model: nn.Module, quant: str) -> nn.Module:
    """With its layers of fewer bits in the place of Linear, as it loads its own files into them."""
    import quantize as theirs

    if quant == "int8":
        return theirs.WeightOnlyInt8QuantHandler(model).convert_for_runtime()
    return theirs.WeightOnlyInt4QuantHandler(model, INT4_GROUP).convert_for_runtime()


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Random weights, and codes of any bits; norms are ones, scales small enough that nothing overflows."""
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.uniform_(-1, 1).mul_(parameter.shape[1] ** -0.5)
        else:
            parameter.fill_(1)
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.fill_(SCALE)
        else:
            bounds = torch.iinfo(buffer.dtype)
            buffer.random_(bounds.min, bounds.max)


def hugging_face(device: torch.device, size: str, prompt_len: int, gen_len: int) -> Callable[[], Taken]:
    with torch.device(device):
        model = hugging_face_model(load_size(size))
    prompt = torch.randint(0, 1024, (1, prompt_len), device=device)
    settings = {"do_sample": False, "cache_implementation": "static", "eos_token_id": None, "pad_token_id": 0}

    def seconds(count: int) -> float:
        start = now(device)
        model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, **settings)
        return now(device) - start

    def run() -> Taken:
        prefill_s = seconds(1)
        return Taken(prefill_s, seconds(gen_len) - prefill_s)

    return run


def now(device: torch.device) -> float:
    synchronize(device)
    return time.perf_counter()


def main() -> None:
    kind, wanted = sys.argv[1], json.loads(sys.argv[2])
    sides = {"gpt_fast": gpt_fast, "hugging_face": hugging_face}
    device = choose_device(wanted.pop("device"), 0, 1)
    torch.manual_seed(1)
    start = time.perf_counter()
    run = sides[kind](device, **wanted)
    run(), run()  # warm-up: the first compiles, the second records graphs
    ready_s = time.perf_counter() - start
    taken = [run() for _ in range(REPETITIONS)]
    prefill_s, decode_s = (statistics.median(times) for times in zip(*taken, strict=True))
    rates = {
        "ready_s": ready_s,
        "prefill_tokens_per_s": wanted["prompt_len"] / prefill_s,
        "decode_tokens_per_s": (wanted["gen_len"] - 1) / decode_s,
        "peak_memory_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    }
    print(json.dumps(rates), flush=True)


if __name__ == "__main__":
    main()
