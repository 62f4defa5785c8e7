"""Figures of a run, taken over all its ranks: for the bench, and for the record of any run."""

import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llama_mp import bench, records
from llama_mp.bench import BenchFlags
from llama_mp.ceiling import Ceiling, measure_ceiling
from llama_mp.config import SamplingConfig
from llama_mp.dtypes import DTYPE_NAMES
from llama_mp.engine import Stats
from llama_mp.errors import say
from llama_mp.files import json_bytes, write_whole
from llama_mp.llm import LLM
from llama_mp.locate import Checkpoint
from llama_mp.memory import cache_bytes, parameters_of
from llama_mp.parallel import connect
from llama_mp.records import RecordConfig
from llama_mp.request import Request
from llama_mp.world import World

REPETITIONS = 3
WARM_UP_TOKENS = 8


def run_bench(flags: BenchFlags, checkpoint: Checkpoint) -> None:
    """One rank's part. Rank 0 prints: the ceiling before anything else, the JSON last."""
    run, world = flags.completed(checkpoint.config), connect(flags)
    ceiling = measure_ceiling(world)
    if world.is_leader:
        print(ceiling_line(ceiling, world), flush=True)
    with LLM.of_checkpoint(run, checkpoint, world, codec=None) as llm:
        if world.is_leader:
            print(model_line(llm), flush=True)
        runs, memory = repeat(llm, run), memory_of(llm)
        cost = cost_of_deterministic(llm, run, runs) if flags.deterministic else {}
        if world.is_leader:
            result = rounded(result_of(llm, flags, ceiling, runs) | cost | memory)
            if flags.record is not None:
                write_record(llm, flags, result)
            show(result, flags)


def repeat(llm: LLM, flags: BenchFlags) -> list[dict[str, float]]:
    """Rank 0: the rates of REPETITIONS runs, after one that warms up and counts for nothing. The others take part."""
    if not llm.world.is_leader:
        while llm.follow():
            pass
        return []
    run_once(llm, flags, min(flags.gen_len, WARM_UP_TOKENS))
    runs = [run_once(llm, flags, flags.gen_len) for _ in range(REPETITIONS)]
    llm.dismiss()
    return runs


def cost_of_deterministic(llm: LLM, flags: BenchFlags, runs: list[dict[str, float]]) -> dict[str, float]:
    """How many times as long as in the ordinary mode: `llm` makes room for it, and the same is measured again."""
    llm.free()
    ordinary = LLM.of_checkpoint(replace(flags, deterministic=False), llm.checkpoint, llm.world, codec=None)
    others = repeat(ordinary, flags)
    ordinary.free()
    if not runs:
        return {}
    slow, fast = median_of(runs), median_of(others)
    return {f"{name}_to_ordinary": slow[f"{name}_s"] / fast[f"{name}_s"] for name in ("ttft", "tpot")}


def run_once(llm: LLM, flags: BenchFlags, gen_len: int) -> dict[str, float]:
    """Greedy, no token ends a row, and the same ids in every run: their values cost nothing more or less."""
    sampling = SamplingConfig(temperature=0, max_gen_len=gen_len)
    vocabulary, length = llm.config.vocab_size, flags.prompt_len
    prompts = [[(1000 + 31 * row + 7 * i) % vocabulary for i in range(length)] for row in range(flags.batch_size)]
    requests = [Request(id=str(row), prompt=prompt, sampling=sampling) for row, prompt in enumerate(prompts)]
    llm.stats = Stats()
    for _ in llm.serve(requests, (flags.max_batch_size, flags.max_seq_len), frozenset()):
        pass
    return rates_of(llm)


def rates_of(llm: LLM) -> dict[str, float | None]:
    """What llm.stats tell of speed; None where nothing was computed."""
    stats = llm.stats
    decoded = stats.decode_steps > 0
    return {
        "ttft_s": stats.first_token_s,
        "tpot_s": stats.decode_s / stats.decode_steps if decoded else None,
        "decode_tokens_per_s": stats.decoded_tokens / stats.decode_s if decoded else None,
        "prefill_tokens_per_s": stats.prefilled_tokens / stats.prefill_s if stats.prefill_s else None,
        "achieved_gb_per_s": decode_bytes(llm) / stats.decode_s / 1e9 if decoded else None,
    }


def decode_bytes(llm: LLM) -> int:
    """Bytes that the decode steps had to read, over all ranks: the weights once a step, or for each row where rows are
    computed one at a time; and the cache in use."""
    stats, mp, two_positions = llm.stats, llm.world.size, llm.fitting.workload((1, 2))
    weights = llm.loaded.weight_bytes - mp * parameters_of(llm.config, mp, two_positions).lookup
    num_reads = stats.decoded_tokens if llm.run.deterministic else stats.decode_steps
    return num_reads * weights + stats.decode_positions * mp * cache_bytes(llm.config, mp, two_positions) // 2


def median_of(runs: list[dict[str, float | None]]) -> dict[str, float]:
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def result_of(llm: LLM, flags: BenchFlags, ceiling: Ceiling, runs: list[dict[str, float]]) -> dict[str, Any]:
    """The last line of a bench, memory aside."""
    rates = median_of(runs)
    return {
        **rates,
        "ceiling_gb_per_s": ceiling.rate / 1e9,
        "fraction_of_ceiling": rates["achieved_gb_per_s"] * 1e9 / ceiling.rate,
        "stream_gb_per_s": ceiling.stream_rate / 1e9,
        "product_gb_per_s": ceiling.product_rate and ceiling.product_rate / 1e9,
        **what_ran(llm),
        "prompt_len": flags.prompt_len,
        "gen_len": flags.gen_len,
        "num_prompts": flags.batch_size,
        "repetitions": len(runs),
        "decode_tokens_per_s_of_each": [round(run["decode_tokens_per_s"], 3) for run in runs],
    }


def rounded(result: dict[str, Any]) -> dict[str, Any]:
    """Floats to six digits, which is more than any clock here is good for."""
    return {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in result.items()}


def what_ran(llm: LLM) -> dict[str, Any]:
    """The model, how it was cut and on what it ran; `batch_size` rows of `seq_len` positions are its cache."""
    num_slots, seq_len = llm.shape
    return {
        "size": llm.config.name,
        "weights": "random" if llm.checkpoint.kind == "random" else "checkpoint",
        "mp": llm.world.size,
        "dtype": dtype_name(llm),
        "quant": llm.run.quant,
        "offload": llm.run.offload,
        "deterministic": llm.run.deterministic,
        "cuda_graphs": llm.runner is not None and llm.runner.uses_graphs,
        "device_type": llm.world.device.type,
        "device": device_name(llm.world.device),
        "device_memory_bytes": device_memory_bytes(llm.world.device),
        "batch_size": num_slots,
        "seq_len": seq_len,
    }


def dtype_name(llm: LLM) -> str:
    return "tf32" if llm.run.dtype == "tf32" else DTYPE_NAMES[llm.dtype]


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else records.cpu_name()


def device_memory_bytes(device: torch.device) -> int:
    is_cuda = device.type == "cuda"
    return torch.cuda.get_device_properties(device).total_memory if is_cuda else records.host_memory_bytes()


def memory_of(llm: LLM) -> dict[str, int]:
    """Every rank calls it: the largest rank's peak, and what was planned for it."""
    peak = max(llm.world.gather(llm.peak_memory.read()))
    return {"peak_memory_bytes": peak, "planned_memory_bytes": llm.planned.allocated_bytes}


def end_run(llm: LLM, flags: RecordConfig) -> None:
    """After a verb's run, on every rank: say how it went, and write the record that --record asks for, unless nothing
    was computed."""
    said = summary(llm)
    if llm.world.is_leader:
        say(said)
    if flags.record is not None and llm.shape != (0, 0):
        memory = memory_of(llm)
        if llm.world.is_leader:
            write_record(llm, flags, rounded(what_ran(llm) | rates_of(llm) | memory))


def write_record(llm: LLM, flags: RecordConfig, result: dict[str, Any]) -> None:
    """`result`: what_ran, rates and memory."""
    versions = {"torch": torch.__version__} | ({"cuda": torch.version.cuda} if torch.version.cuda else {})
    record = {
        "verb": Path(sys.argv[0]).stem,
        "date": records.today(),
        **result,
        "plan": llm.planned._asdict(),
        "environment": records.environment(versions) | {"threads_per_rank": torch.get_num_threads()},
        "command": records.command_of(flags, llm.world.size),
    }
    path = records.save(flags.record, record)
    say(f"recorded in {path}")


def summary(llm: LLM) -> str:
    """The end line of a run. Every rank calls it; rates and bytes are sums over the ranks, memory the largest."""
    loaded, rates, memory = llm.loaded, rates_of(llm), memory_of(llm)
    load_rate = loaded.bytes_read / loaded.seconds
    parts = [f"loaded {loaded.bytes_read / 1e9:.2f} GB in {loaded.seconds:.1f} s ({load_rate / 1e9:.2f} GB/s)"]
    if rates["ttft_s"] is not None:
        parts.append(f"TTFT {rates['ttft_s']:.3f} s")
    if rates["decode_tokens_per_s"] is not None:
        parts.append(f"{rates['decode_tokens_per_s']:.1f} tokens/s; {rates['achieved_gb_per_s']:.1f} GB/s")
    peak, planned = memory["peak_memory_bytes"], memory["planned_memory_bytes"]
    return "; ".join([*parts, f"peak memory {peak / 1e9:.2f} GB per rank (planned {planned / 1e9:.2f} GB)"])


# ---- what is printed -----------------------------------------------------------------------------------------------


def ceiling_line(ceiling: Ceiling, world: World) -> str:
    if world.device.type == "cuda":
        return f"{world.size} x {device_name(world.device)} read memory at {ceiling.rate / 1e9:.1f} GB/s: the ceiling"
    return (
        f"{world.size} x {torch.get_num_threads()} threads read memory at {ceiling.stream_rate / 1e9:.1f} GB/s, as a "
        f"matrix by a product ({ceiling.product}) at {ceiling.product_rate / 1e9:.1f}: the ceiling is "
        f"{ceiling.rate / 1e9:.1f} GB/s"
    )


def model_line(llm: LLM) -> str:
    kind = "random weights" if llm.checkpoint.kind == "random" else "weights"
    weights = "" if llm.run.quant == "none" else f", weights {llm.run.quant}"
    weights += ", deterministic" if llm.run.deterministic else ""
    tokens = f"{llm.config.name}, MP {llm.world.size}, {dtype_name(llm)}{weights} on {device_name(llm.world.device)}"
    return f"{tokens}: {kind} of {llm.loaded.weight_bytes / 1e9:.2f} GB in {llm.loaded.seconds:.1f} s"


def show(result: dict[str, Any], flags: BenchFlags) -> None:
    for line in bench.lines(result):
        print(line)
    if flags.json is not None:
        write_whole(flags.json, json_bytes(result))
    print(json.dumps(result), flush=True)
