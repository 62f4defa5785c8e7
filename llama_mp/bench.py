"""What a bench run is asked, and what it says. The measuring itself is in measure.py."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llama_mp.config import LogConfig, ModelConfig, RunConfig
from llama_mp.errors import RequestError
from llama_mp.flags import check_at_least, flag
from llama_mp.locate import Checkpoint, locate_weights, random_checkpoint
from llama_mp.records import RecordConfig


@dataclass(frozen=True, kw_only=True)
class BenchFlags(RunConfig, RecordConfig, LogConfig):
    prompt_len: int = flag(128, "tokens of each prompt")
    gen_len: int = flag(128, "tokens generated after each prompt")
    batch_size: int = flag(1, "prompts")
    max_batch_size: int | None = flag(None, "rows computed at once; default: --batch_size")
    random_weights: bool = flag(False, "make weights for the shape of --size; no checkpoint is needed")
    json: Path | None = flag(None, "write the last line, the results in JSON, to this file too")
    mp: int | None = flag(None, "start this many ranks; default: torchrun's, or 1, or in a job as planned")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, prompt_len=1, gen_len=2, batch_size=1)
        if self.random_weights and self.ckpt_dir is not None:
            raise RequestError("--random_weights and --ckpt_dir are both given: drop one; a shape is named with --size")
        if self.max_seq_len and self.max_seq_len < self.row_len:
            raise RequestError(
                f"--max_seq_len is {self.max_seq_len}, below --prompt_len {self.prompt_len} + --gen_len {self.gen_len}"
            )
        if self.json is not None and not self.json.parent.is_dir():
            raise RequestError(f"--json {self.json}: no folder {self.json.parent}; make it, or give another path")

    @property
    def row_len(self) -> int:
        return self.prompt_len + self.gen_len

    def completed(self, config: ModelConfig) -> "BenchFlags":
        """With the size of the cache filled in. Raises RequestError for a row beyond the model's context."""
        if self.row_len > config.context_length:
            raise RequestError(
                f"--prompt_len {self.prompt_len} + --gen_len {self.gen_len} are {self.row_len} tokens, above "
                f"{config.context_length}, the context of {config.name}: lower one of them"
            )
        num_rows = min(self.batch_size, self.max_batch_size or self.batch_size)
        return replace(self, max_batch_size=num_rows, max_seq_len=self.max_seq_len or self.row_len)


def find_model(flags: BenchFlags) -> Checkpoint:
    """The checkpoint to measure, or none but its shape. No tokenizer is needed."""
    return random_checkpoint(flags) if flags.random_weights else replace(locate_weights(flags), tokenizer=None)


def lines(result: Mapping[str, Any]) -> Iterator[str]:
    """The results for people."""
    yield (
        f"{result['num_prompts']} x ({result['prompt_len']} + {result['gen_len']}) tokens, "
        f"medians of {result['repetitions']} runs after a warm-up"
    )
    yield f"TTFT {result['ttft_s']:.3g} s; prefill {result['prefill_tokens_per_s']:.1f} tokens/s"
    yield (
        f"TPOT {result['tpot_s']:.3g} s; decode {result['decode_tokens_per_s']:.1f} tokens/s; "
        f"{result['achieved_gb_per_s']:.1f} GB/s, {result['fraction_of_ceiling']:.0%} of the ceiling"
    )
    if "tpot_to_ordinary" in result:
        ttft, tpot = result["ttft_to_ordinary"], result["tpot_to_ordinary"]
        yield f"the same bits at every degree take {ttft:.2f} times the ordinary mode's TTFT, {tpot:.2f} times its TPOT"
    peak, planned = result["peak_memory_bytes"], result["planned_memory_bytes"]
    yield f"peak memory {peak / 1e9:.2f} GB per rank, planned {planned / 1e9:.2f} GB"
