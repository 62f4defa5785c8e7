"""What fewer bits cost in quality: the perplexity of SmolLM2-135M in fp32, bf16, int8 and int4 on a book.

The text, `tests/data/alice.txt`, is read in windows, each from an empty context: perplexity is exp of the mean negative
log-probability of all tokens but the first of each. int8 and int4 compute in the type that runs choose by themselves.
The weights of this model come from a file of 4 bits: what int4 does to weights that were never quantized,
tests/test_quant.py holds on random ones. The last line is JSON; `--save` keeps it in benchmarks/results/.
"""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from machine import environment, keep

from llama_mp import cli
from llama_mp.flags import Flags, check_at_least, flag
from llama_mp.llm import LLM

TEXT = Path(__file__).parents[1] / "tests" / "data" / "alice.txt"
KINDS: dict[str, dict[str, Any]] = {
    "fp32": {"dtype": "fp32"},
    "bf16": {"dtype": "bf16"},
    "int8": {"quant": "int8"},
    "int4": {"quant": "int4"},
}


@dataclass(frozen=True, kw_only=True)
class QualityFlags(Flags):
    window: int = flag(512, "tokens read at once, without those before")
    max_tokens: int | None = flag(None, "read no more tokens than this; default: the whole text")
    save: bool = flag(False, "keep the result in benchmarks/results/quality.jsonl")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, window=2, max_tokens=2)


def main(flags: QualityFlags) -> None:
    found: dict[str, dict[str, Any]] = {}
    for kind, options in KINDS.items():
        with LLM(device="cpu", **options) as llm:
            tokens = llm.codec.tokenizer.encode(TEXT.read_text(encoding="utf-8"), bos=False)[: flags.max_tokens]
            start = time.perf_counter()
            value = perplexity(llm, tokens, flags.window)
            seconds, weight_bytes = time.perf_counter() - start, llm.loaded.weight_bytes
        ratio = value / found["fp32"]["perplexity"] if found else 1.0
        found[kind] = {"perplexity": value, "of_fp32": ratio, "weight_bytes": weight_bytes}
        said = f"{kind}: perplexity {value:.3f}, {ratio:.4f} of fp32's; weights {weight_bytes / 1e6:.1f} MB"
        print(f"{said}; {len(tokens)} tokens in {seconds:.0f} s", flush=True)
    result = environment() | {"text": TEXT.name, "tokens": len(tokens), "window": flags.window, "kinds": found}
    if flags.save:
        keep("quality", result)
    print(json.dumps(result))


def perplexity(llm: LLM, tokens: Sequence[int], window: int) -> float:
    """Of the tokens but the first of each window."""
    runner = llm.prepare([1, window])
    total, count = 0.0, 0
    for start in range(0, len(tokens) - 1, window):
        part = tokens[start : start + window]
        logits_NV = runner.prefill(part, slot=0, start=0, all_logits=True)
        losses = torch.nn.functional.cross_entropy(logits_NV[:-1].float(), torch.tensor(part[1:]), reduction="sum")
        total, count = total + losses.item(), count + len(part) - 1
    return math.exp(total / count)


if __name__ == "__main__":
    cli.main(QualityFlags, main, summary=__doc__)
