"""Decode speed on this machine's CPU beside Hugging Face: SmolLM2-135M in bf16, MP = 1, greedy, batch 1.

Both run in this process, on the same threads, in turn, `--pairs` times: the memory speed of a shared machine drifts, so
only the ratio within a pair means much. Hugging Face runs its forward function with its KV cache, without the rest of
`generate`. Prints the physical ceiling first; the last line is JSON. `--save` keeps it in benchmarks/results/.
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers
from machine import environment, keep, memory_read_rate

from llama_mp import cli
from llama_mp.config import SamplingConfig
from llama_mp.engine import Engine
from llama_mp.flags import Flags, check_at_least, flag
from llama_mp.llm import LLM
from llama_mp.request import Request
from llama_mp.runner import Leader


@dataclass(frozen=True, kw_only=True)
class BenchFlags(Flags):
    prompt_len: int = flag(128, "tokens of the prompt")
    gen_len: int = flag(64, "tokens decoded")
    pairs: int = flag(7, "times that each is run, in turn")
    save: bool = flag(False, "keep the result in benchmarks/results/decode.jsonl")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, prompt_len=1, gen_len=2, pairs=1)


def main(flags: BenchFlags) -> None:
    with LLM(dtype="bf16", device="cpu") as llm, torch.inference_mode():
        read_rate = memory_read_rate()
        ceiling = read_rate / llm.loaded.weight_bytes
        print(f"{torch.get_num_threads()} threads read memory at {read_rate / 1e9:.1f} GB/s", end="; ")
        print(f"weights of {llm.loaded.weight_bytes / 1e9:.3f} GB: at most {ceiling:.1f} tokens/s")
        prompt = list(range(1000, 1000 + flags.prompt_len))
        contenders = {"llama-mp": ours(llm, prompt, flags), "Hugging Face": theirs(llm, prompt, flags)}
        rates: dict[str, list[float]] = {name: [] for name in contenders}
        for run in contenders.values():
            run()  # warm-up
        for _ in range(flags.pairs):
            for name, run in contenders.items():
                rates[name].append(run())
        weight_bytes = llm.loaded.weight_bytes
    report(flags, rates, ceiling, weight_bytes)


def ours(llm: LLM, prompt: list[int], flags: BenchFlags) -> Callable[[], float]:
    """A run of our engine, as infer uses it; returns decoded tokens/s."""
    leader = Leader(llm.prepare([1, flags.prompt_len + flags.gen_len]), llm.world)
    sampling = SamplingConfig(temperature=0, max_gen_len=flags.gen_len)

    def run() -> float:
        engine = Engine(leader, eos_ids=frozenset())
        engine.submit(Request(id="0", prompt=prompt, sampling=sampling))
        while engine.has_work:
            engine.step()
        return engine.stats.decoded_tokens / engine.stats.decode_s

    return run


def theirs(llm: LLM, prompt: list[int], flags: BenchFlags) -> Callable[[], float]:
    """The same shape in Hugging Face's model; returns decoded tokens/s, which do not depend on the weights' values."""
    shape = llm.config
    config = transformers.LlamaConfig(
        hidden_size=shape.dim,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        intermediate_size=shape.hidden_dim,
        vocab_size=shape.vocab_size,
        max_position_embeddings=shape.context_length,
        tie_word_embeddings=shape.tied_embeddings,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()

    def run() -> float:
        out = model(torch.tensor([prompt]), use_cache=True)
        start = time.perf_counter()
        for _ in range(flags.gen_len - 1):
            token = out.logits[:, -1:].argmax(-1)
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
        return (flags.gen_len - 1) / (time.perf_counter() - start)

    return run


def report(flags: BenchFlags, rates: dict[str, list[float]], ceiling: float, weight_bytes: int) -> None:
    ratios = [a / b for a, b in zip(*rates.values(), strict=True)]
    for name, values in rates.items():
        median = statistics.median(values)
        print(
            f"{name:14}{median:7.1f} tokens/s (from {min(values):.1f} to {max(values):.1f}), "
            f"{median * weight_bytes / 1e9:.1f} GB/s of weights, {median / ceiling:.0%} of the ceiling"
        )
    print(f"ratio, median of {len(ratios)} pairs: {statistics.median(ratios):.2f}")
    result = environment(transformers) | {
        "prompt_len": flags.prompt_len,
        "gen_len": flags.gen_len,
        "ceiling_tokens_per_s": round(ceiling, 1),
        "tokens_per_s": {name: [round(rate, 1) for rate in values] for name, values in rates.items()},
        "ratio": round(statistics.median(ratios), 2),
    }
    if flags.save:
        keep("decode", result)
    print(json.dumps(result))


if __name__ == "__main__":
    cli.main(BenchFlags, main, summary=__doc__)
