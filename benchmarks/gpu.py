"""Decoding and prompts on a GPU beside its memory, cuBLAS, gpt-fast and Hugging Face; random weights, made there.

    python benchmarks/gpu.py --out results --gpt_fast ~/gpt-fast
    python benchmarks/gpu.py --parts decode,quant --size 7B

The read rate of the device comes first. A part is a list of cases; each writes its line, with its targets and whether
they are met, as soon as it is measured. One that fails is reported, and the rest go on: exit code 1. Each model is a
process of its own, since another one's leavings would hide memory that it takes. gpt-fast is a checkout of its
repository; without one it is left out, which is said.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from gpu_parts import PARTS, Case, Found, Goal
from gpu_runs import RunFlags, Runs
from machine import environment, write_line

from llama_mp import cli
from llama_mp.errors import RequestError, say
from llama_mp.flags import flag
from llama_mp.records import quoted, without_names

SHOWN = ("decode_tokens_per_s", "prefill_tokens_per_s", "achieved_gb_per_s", "tpot_s", "ttft_s", "ready_s")


@dataclass(frozen=True, kw_only=True)
class GpuFlags(RunFlags):
    parts: str = flag(",".join(PARTS), "which, separated by commas; they run in this order")

    def __post_init__(self) -> None:
        super().__post_init__()
        if unknown := [name for name in self.names if name not in PARTS]:
            raise RequestError(f"--parts: unknown {', '.join(unknown)}; valid: {', '.join(PARTS)}")

    @property
    def names(self) -> list[str]:
        return self.parts.split(",")


class Outcome(NamedTuple):
    """Of all cases: what each found, by its name; those that failed."""

    goals: list[tuple[str, Goal]]
    failed: list[str]


def main(flags: GpuFlags) -> int:
    runs = Runs(flags)
    ways = ", ".join(f"{way} {rate:.0f}" for way, rate in runs.ceiling["gb_per_s"].items())
    print(f"{runs.ceiling['device']} reads {runs.ceiling['read_gb_per_s']:.0f} GB/s (GB/s by {ways})", flush=True)
    outcome = measure(runs, flags.names)
    aims = [(case, goal) for case, goal in outcome.goals if goal.is_met is not None]
    print(f"\n{sum(goal.is_met for _, goal in aims)} of {len(aims)} targets met; {len(outcome.failed)} cases failed")
    for case, goal in aims:
        print(f"{case:32} {goal.line()}")
    told = [goal.record() | {"case": case} for case, goal in outcome.goals]
    print(json.dumps({"goals": told, "failed": outcome.failed}))
    return 1 if outcome.failed else 0


def measure(runs: Runs, parts: list[str]) -> Outcome:
    """Each case of each of `parts`."""
    outcome = Outcome([], [])
    for part, case in ((part, case) for part, cases in PARTS.items() if part in parts for case in cases(runs)):
        start = time.perf_counter()
        try:
            found = case.measure()
        except Exception as error:  # of whatever kind: time on a card is dear, and the others can be measured
            say(f"failed: {part}: {case.name}: {error}")
            outcome.failed.append(f"{part}: {case.name}")
            continue
        outcome.goals.extend((case.name, goal) for goal in found.goals)
        tell(runs, part, case, found, time.perf_counter() - start)
    return outcome


def tell(runs: Runs, part: str, case: Case, found: Found, seconds: float) -> None:
    """Print a case, and keep it where that is wanted."""
    rates = [f"{name.replace('_per_', '/')} {found.figures[name]:.4g}" for name in SHOWN if name in found.figures]
    print(f"{part}: {case.name}: " + ", ".join([*rates, *found.remarks, f"{seconds:.0f} s to measure"]), flush=True)
    for goal in found.goals:
        print(f"    {goal.line()}", flush=True)
    if runs.asked.out is None:
        return
    about = environment()
    about["versions"] |= runs.ceiling["versions"]
    about["command"] = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *map(private, sys.argv[1:])])
    about |= {"device": runs.ceiling["device"], "ceiling": runs.ceiling, "part": part, "case": case.name}
    about |= {"figures": found.figures, "remarks": found.remarks, "goals": [goal.record() for goal in found.goals]}
    write_line(runs.asked.out / "gpu.jsonl", about)


def private(word: str) -> str:
    """A word of the command without names of this machine's folders."""
    return quoted(without_names(word))


if __name__ == "__main__":
    cli.main(GpuFlags, main, summary=__doc__)
