"""One side of the comparison in benchmarks/cpu.py: a process that has loaded its model, and for each line on standard
input runs it twice and answers with a line of JSON about the second time: tokens/s of a prompt and of decoding, greedy,
batch 1.

python benchmarks/contender.py ours|theirs|llama_cpp|kernel FILE THREADS PROMPT_LEN GEN_LEN [QUANT]

With ATEN_CPU_CAPABILITY=avx2 ours leaves AVX-512 alone, too.
"""

import atexit
import ctypes
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llama_mp.config import ModelConfig

Run = Callable[[], Mapping[str, float]]
STREAMED_BYTES, PASSES = 1.2e9, 20  # by the kernel alone: more than any cache holds, as often as others take a step


def ours(file: str, threads: int, prompt_len: int, gen_len: int, quant: str) -> Run | None:
    """Our engine as `infer` uses it; None on every rank but the first, once that is done."""
    os.environ["LLAMA_MP_THREADS"] = str(threads)
    from llama_mp.config import RunConfig, SamplingConfig
    from llama_mp.engine import Stats
    from llama_mp.llm import LLM
    from llama_mp.locate import locate_weights
    from llama_mp.measure import rates_of
    from llama_mp.parallel import connect
    from llama_mp.request import Request

    run_config = RunConfig(ckpt_dir=Path(file), dtype="bf16", device="cpu", quant=quant)
    checkpoint = replace(locate_weights(run_config), tokenizer=None)
    llm = LLM.of_checkpoint(run_config, checkpoint, connect(run_config), codec=None)
    if not llm.world.is_leader:
        while llm.follow():
            pass
        llm.close()
        return None

    def run() -> Mapping[str, float]:
        llm.stats = Stats()
        sampling = SamplingConfig(temperature=0, max_gen_len=gen_len)
        request = Request(id="0", prompt=prompt_of(prompt_len), sampling=sampling)
        for _ in llm.serve([request], (1, prompt_len + gen_len), frozenset()):
            pass
        rates = rates_of(llm)
        names = ("prefill_tokens_per_s", "decode_tokens_per_s", "achieved_gb_per_s")
        return {name: rates[name] for name in names}

    atexit.register(lambda: (llm.dismiss(), llm.close()))
    return run


def kernel(_file: str, threads: int, *_: object) -> Run:
    """The bf16 product by itself, over matrices of more than 1 GB in all."""
    from llama_mp.kernels import linear_of_few

    torch.set_num_threads(threads)
    rows, cols = 11264, 2048
    weights = [torch.randn(rows, cols).bfloat16() for _ in range(round(STREAMED_BYTES / (2 * rows * cols)))]
    x = torch.randn(1, cols)

    def run() -> Mapping[str, float]:
        start = time.perf_counter()
        for weight in weights * PASSES:
            linear_of_few(x, weight)
        return {"achieved_gb_per_s": PASSES * sum(w.nbytes for w in weights) / (time.perf_counter() - start) / 1e9}

    return run


def hugging_face_model(shape: ModelConfig) -> Any:
    """Hugging Face's, random in bf16, on torch's default device."""
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=shape.dim,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        intermediate_size=shape.hidden_dim,
        vocab_size=shape.vocab_size or 49152,
        max_position_embeddings=shape.context_length,
        tie_word_embeddings=shape.tied_embeddings,
    )
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def theirs(file: str, threads: int, prompt_len: int, gen_len: int, _quant: str) -> Run:
    """Hugging Face's forward function with its KV cache, in bf16; the values of weights do not change its speed."""
    from llama_mp.config import RunConfig
    from llama_mp.locate import locate_weights

    torch.set_num_threads(threads)
    model = hugging_face_model(locate_weights(RunConfig(ckpt_dir=Path(file))).config)

    @torch.inference_mode()
    def run() -> Mapping[str, float]:
        start = time.perf_counter()
        out = model(torch.tensor([prompt_of(prompt_len)]), use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1:].argmax(-1)
        prefilled = time.perf_counter()
        for _ in range(gen_len - 1):
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
        return rates(start, prefilled, prompt_len, gen_len)

    return run


def llama_cpp(file: str, threads: int, prompt_len: int, gen_len: int, _quant: str) -> Run:
    """llama.cpp through its C interface, as llama-cpp-python ships it."""
    import llama_cpp as lib
    import numpy as np

    lib.llama_backend_init()
    keep_quiet(lib)
    model = lib.llama_model_load_from_file(file.encode(), lib.llama_model_default_params())
    wanted = lib.llama_context_default_params()
    wanted.n_ctx, wanted.n_batch = prompt_len + gen_len + 64, max(prompt_len, 64)
    wanted.n_threads = wanted.n_threads_batch = threads
    context = lib.llama_init_from_model(model, wanted)
    vocab_size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))

    def step(tokens: list[int]) -> int:
        array = (lib.llama_token * len(tokens))(*tokens)  # named: the batch holds its address alone
        assert lib.llama_decode(context, lib.llama_batch_get_one(array, len(tokens))) == 0
        return int(np.ctypeslib.as_array(lib.llama_get_logits(context), shape=(vocab_size,)).argmax())

    def run() -> Mapping[str, float]:
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        start = time.perf_counter()
        token = step(prompt_of(prompt_len))
        prefilled = time.perf_counter()
        for _ in range(gen_len - 1):
            token = step([token])
        return rates(start, prefilled, prompt_len, gen_len)

    return run


def keep_quiet(lib: object) -> None:
    lib.quiet = lib.llama_log_callback(lambda *_: None)  # kept: llama.cpp calls it as long as it runs
    lib.llama_log_set(lib.quiet, ctypes.c_void_p())


def prompt_of(length: int) -> list[int]:
    return [1000 + 7 * i for i in range(length)]


def rates(start: float, prefilled: float, prompt_len: int, gen_len: int) -> dict[str, float]:
    return {
        "prefill_tokens_per_s": prompt_len / (prefilled - start),
        "decode_tokens_per_s": (gen_len - 1) / (time.perf_counter() - prefilled),
    }


def without_avx512() -> None:
    """Let our kernels be those of a machine with AVX2 alone."""
    from llama_mp import fused, kernels

    kernels.NATIVE = fused.NATIVE = "-march=x86-64-v3"
    kernels.fast_bf16 = lambda: None


def main() -> None:
    if os.environ.get("ATEN_CPU_CAPABILITY") == "avx2":
        without_avx512()
    kind, file, threads, prompt_len, gen_len, *quant = sys.argv[1:]
    sides = {"ours": ours, "kernel": kernel, "theirs": theirs, "llama_cpp": llama_cpp}
    run = sides[kind](file, int(threads), int(prompt_len), int(gen_len), *quant or ["none"])
    if run is None:
        return
    run()  # warm-up
    print("ready", flush=True)
    while sys.stdin.readline():
        run()  # the memory of a process that was idle for a while may be slow to come back
        print(json.dumps(run()), flush=True)


if __name__ == "__main__":
    main()
