"""Decoding and prompts on this machine's CPU beside Hugging Face and llama.cpp (if llama-cpp-python is installed).

SmolLM2 and a shape of 1.1B parameters with random weights; batch 1, greedy; ours in bf16, int8 and int4, over one rank
with two threads and over two ranks with one each. Each side is a process of its own that has loaded its model; they run
in turn, `--rounds` times, and what counts is the median of the ratios within a round: the speed of a shared machine's
memory drifts. The last line is JSON. `--save` keeps it in benchmarks/results/.
"""

import importlib.metadata
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gguf_files import requantize, write_random
from machine import environment, keep

from llama_mp import cli
from llama_mp.config import RunConfig
from llama_mp.flags import Flags, check_at_least, flag
from llama_mp.locate import locate_weights

AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
CONTENDER = Path(__file__).with_name("contender.py")
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
QUANTS = {"bf16": "none", "int8": "int8", "int4": "int4"}
FILES = {"bf16": "bf16", "int8": "q8_0", "int4": "q4_0"}  # llama.cpp's nearest to each


@dataclass(frozen=True, kw_only=True)
class CpuFlags(Flags):
    prompt_len: int = flag(128, "tokens of the prompt")
    gen_len: int = flag(64, "tokens decoded")
    rounds: int = flag(5, "times that each is run, in turn")
    threads: int = flag(2, "threads of each side, shared by its ranks")
    model: tuple[str, ...] = flag(("smollm2", "1.1b"), "which of these; may be given several times")
    folder: Path | None = flag(None, "where the GGUF files are made, and found again; default: a temporary one")
    avx2: bool = flag(False, "as on a machine without AVX-512; llama.cpp must be one that was built without")
    save: bool = flag(False, "keep the result in benchmarks/results/cpu.jsonl")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, prompt_len=1, gen_len=2, rounds=1, threads=2)


class Side:
    """A contender's process."""

    def __init__(self, *arguments: str, several_ranks: bool = False) -> None:
        command = [sys.executable, *(TORCHRUN if several_ranks else []), str(CONTENDER), *arguments]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if (said := self.process.stdout.readline()) != "ready\n":
            raise RuntimeError(f"{' '.join(arguments)} is not ready: {said!r}")

    def run(self) -> dict[str, float]:
        print(file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def main(flags: CpuFlags) -> None:
    os.environ |= AVX2 if flags.avx2 else {}  # of the contenders
    has_llama_cpp = importlib.util.find_spec("llama_cpp") is not None
    if not has_llama_cpp:
        print("llama-cpp-python is not installed: no comparison with llama.cpp (pip install llama-cpp-python)")
    results = {}
    with tempfile.TemporaryDirectory() as temporary:
        for model in flags.model:
            files = make_files(model, flags.folder or Path(temporary), has_llama_cpp)
            found = measure(flags, files, has_llama_cpp)
            results[model] = summary(found)
            show(model, results[model])
    peers = ["transformers", *(["llama-cpp-python"] if has_llama_cpp else [])]
    versions = {name: importlib.metadata.version(name) for name in peers}
    result = environment() | {"avx512": not flags.avx2, "prompt_len": flags.prompt_len, "gen_len": flags.gen_len}
    result |= {"models": results}
    result["versions"] |= versions
    if flags.save:
        keep("cpu", result)
    print(json.dumps(result))


def make_files(model: str, folder: Path, has_llama_cpp: bool) -> dict[str, Path]:
    """GGUF files of the model, by the type of their weights; without llama.cpp only what ours reads."""
    files = {kind: folder / f"{model}.{kind}.gguf" for kind in FILES.values()}
    if model == "smollm2":
        [original] = locate_weights(RunConfig()).files
        if not has_llama_cpp:
            return {"bf16": original}
        if not files["bf16"].exists():
            requantize(original, files["bf16"], "bf16")
    elif not files["bf16"].exists():
        write_random(files["bf16"])
    for kind, file in files.items():
        if has_llama_cpp and not file.exists():
            requantize(files["bf16"], file, kind)
    return files


def measure(flags: CpuFlags, files: dict[str, Path], has_llama_cpp: bool) -> dict[str, list[dict[str, float]]]:
    """Each side's rates in each round."""
    lengths, threads = (str(flags.prompt_len), str(flags.gen_len)), str(flags.threads)
    sides = {"kernel": Side("kernel", "-", threads, *lengths)}
    for kind, quant in QUANTS.items():
        sides[f"ours {kind}"] = Side("ours", str(files["bf16"]), threads, *lengths, quant)
        half = str(flags.threads // 2)
        sides[f"ours {kind} MP 2"] = Side("ours", str(files["bf16"]), half, *lengths, quant, several_ranks=True)
        if has_llama_cpp:
            sides[f"llama.cpp {FILES[kind]}"] = Side("llama_cpp", str(files[FILES[kind]]), threads, *lengths)
    sides["Hugging Face bf16"] = Side("theirs", str(files["bf16"]), threads, *lengths)
    rounds = [{name: side.run() for name, side in sides.items()} for _ in range(flags.rounds)]
    for side in sides.values():
        side.end()
    return {name: [one[name] for one in rounds] for name in sides}


def summary(found: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Medians of each side's rates, and of the ratios within the rounds."""
    rates = {
        name: {key: round(statistics.median(run[key] for run in runs), 2) for key in runs[0]}
        for name, runs in found.items()
    }
    pairs = {"bf16 of kernel": ("ours bf16", "kernel", "achieved_gb_per_s")}
    for what in ("decode", "prefill"):
        key = f"{what}_tokens_per_s"
        pairs[f"{what} bf16 of Hugging Face"] = ("ours bf16", "Hugging Face bf16", key)
        for kind, theirs in FILES.items():
            pairs[f"{what} {kind} of llama.cpp {theirs}"] = (f"ours {kind}", f"llama.cpp {theirs}", key)
            pairs[f"{what} {kind} MP 2 of MP 1"] = (f"ours {kind} MP 2", f"ours {kind}", key)
    ratios = {
        name: round(statistics.median(a[key] / b[key] for a, b in zip(found[ours], found[theirs], strict=True)), 3)
        for name, (ours, theirs, key) in pairs.items()
        if theirs in found
    }
    return {"rates": rates, "ratios": ratios, "rounds": len(found["kernel"])}


def show(model: str, result: dict[str, Any]) -> None:
    print(f"{model}, medians of {result['rounds']} rounds on {torch.get_num_threads()} cores")
    for name, rates in result["rates"].items():
        print(f"  {name:20} " + ", ".join(f"{key.replace('_per_', '/')} {rate:.1f}" for key, rate in rates.items()))
    for name, ratio in result["ratios"].items():
        print(f"  {name:36} {ratio:.2f} x")


if __name__ == "__main__":
    cli.main(CpuFlags, main, summary=__doc__)
