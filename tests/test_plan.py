"""launch/plan.py: the figures that people know, the contract's JSON, what fits and what is advised, without torch."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
from factory import MODELS, checkpoint, hugging_face, random_tensors, write_gguf, write_hf, write_meta
from hypothesis import given, settings
from hypothesis import strategies as st
from running import ROOT, Done, Talk, run

from llama_mp.advice import (
    Device,
    advice,
    fits,
    flags_of,
    max_batch_size,
    max_seq_len,
    tokens_per_s,
    with_staying,
)
from llama_mp.checkpoint.load import open_source
from llama_mp.config import load_size, size_names
from llama_mp.gpus import find_gpu
from llama_mp.headers import whole_config
from llama_mp.memory import Workload, checkpoint_bytes, rank_memory
from llama_mp.plan import PlanFlags, plan_one

PLAN = str(ROOT / "launch" / "plan.py")
KEYS = [
    "size",
    "mp",
    "dtype",
    "quant",
    "deterministic",
    "batch_size",
    "seq_len",
    "per_rank",
    "host_bytes",
    "disk_bytes",
    "fits",
]
KEYS += ["valid_mp", "max_batch_size"]
PARTS = ["weights_bytes", "kv_cache_bytes", "activation_bytes", "runtime_bytes", "total_bytes"]
# GB of the table that goes around: fp16, batch 2, length 1024. Model on disk, cache, total.
KNOWN = {"7B": (13, 1, 14), "13B": (25, 2, 27), "33B": (65, 3, 68), "65B": (130, 5, 135)}
WITHOUT_CARD = "/usr/bin:/bin"


def plan(*flags: str | Path, **env: str) -> Done:
    return run(sys.executable, PLAN, *flags, **{"PATH": WITHOUT_CARD} | env)


def planned(*flags: str | Path) -> dict | list:
    done = plan(*flags, "--json")
    assert done.code == 0, done.stderr
    return json.loads(done.stdout)


def near(found: float, known: float) -> bool:
    """Within 5% or 1 GB, whichever is larger."""
    return abs(found - known) <= max(0.05 * known, 1.0)


# ---- figures -----------------------------------------------------------------------------------------------------


def test_the_table_has_the_known_figures() -> None:
    done = plan("--batch_size", "2", "--seq_len", "1024")
    lines = [line.split() for line in done.stdout.splitlines()]
    head = next(line for line in lines if "activations" in line)
    assert head == [
        "model",
        "MP",
        "on",
        "disk",
        "weights",
        "cache",
        "activations",
        "together",
        "runtime",
        "per",
        "rank",
    ]
    rows = {line[0]: list(map(float, line[2:])) for line in lines if line[1:2] == ["1"]}
    assert list(rows) == size_names()
    for size, (on_disk, cache, total) in KNOWN.items():
        found_disk, _, found_cache, _, together, runtime, per_rank = rows[size]
        assert near(found_disk, on_disk) and near(found_cache, cache) and near(together, total)
        assert per_rank == pytest.approx(together + runtime, abs=0.02)


def test_the_table_as_json_is_a_list_of_every_size_and_degree() -> None:
    plans = planned()
    assert [(p["size"], p["mp"]) for p in plans] == [(s, mp) for s in size_names() for mp in (1, 2, 4, 8)]
    assert all(list(p) == KEYS for p in plans)
    assert [p["mp"] for p in planned("--mp", "16")] == [16] * sum(load_size(s).num_heads >= 16 for s in size_names())


def test_one_size_as_json_is_the_contract() -> None:
    found = planned("--size", "30b", "--mp", "8", "--gpu", "a100")
    assert list(found) == KEYS and list(found["per_rank"]) == PARTS
    memory = rank_memory(load_size("33B"), 8, Workload(dtype="fp16"))
    assert found["per_rank"] == memory._asdict() | {"total_bytes": memory.total_bytes}
    assert (found["size"], found["fits"], found["valid_mp"]) == ("33B", True, list(range(1, 53)))
    assert found["disk_bytes"] == checkpoint_bytes(load_size("33B"), "fp16")
    more = planned("--size", "33B", "--mp", "8", "--gpu", "a100", "--batch_size", str(found["max_batch_size"] + 1))
    assert more["fits"] is False and more["max_batch_size"] == found["max_batch_size"]


def test_without_a_card_nothing_is_said_of_fitting() -> None:
    found = planned("--size", "7B")
    assert found["fits"] is None and found["max_batch_size"] is None
    assert "give --gpu NAME or --vram_gib GIB" in plan("--size", "7B").stdout


def test_the_card_of_this_machine_is_taken(tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA GeForce RTX 3090, 24576'\n")
    program.chmod(0o755)
    done = plan("--size", "7B", PATH=f"{tmp_path}:{WITHOUT_CARD}")
    assert "fits NVIDIA GeForce RTX 3090, 24.0 GiB" in done.stdout


def test_disk_offload_needs_the_blocks_a_second_time() -> None:
    plain, disk = (planned("--size", "7B", "--offload", place)["disk_bytes"] for place in ("none", "disk"))
    assert disk - plain == pytest.approx(plain, rel=0.05)  # all but the embeddings and the output


# ---- speed, and what it takes ------------------------------------------------------------------------------------


def test_neither_torch_nor_the_slow_modules_are_imported() -> None:
    code = """
import runpy, sys, time
start = time.perf_counter()
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit:
    print("imported:", sorted({"torch", "gguf", "numpy"} & set(sys.modules)), time.perf_counter() - start < 1.5)
"""
    for flags in ([], ["--size", "7B", "--gpu", "RTX 2080"]):
        done = run(sys.executable, "-c", code, PLAN, *flags, PYTHONPATH=str(ROOT), PATH=WITHOUT_CARD)
        assert done.stdout.splitlines()[-1] == "imported: [] True", done  # 0.2 s alone on two cores


# ---- what fits, what does not ------------------------------------------------------------------------------------


def test_a_model_that_does_not_fit_comes_with_what_does_the_fastest_first() -> None:
    done = plan("--size", "7B", "--gpu", "RTX 2080", "--batch_size", "2", "--seq_len", "1024")
    lines = done.stdout.splitlines()
    assert "does not fit RTX 2080, 8.0 GiB of which the driver keeps 1.5%" in lines
    options = [line.strip() for line in lines if line.startswith("  --")]
    rates = [float(option.split("at most ")[1].split()[0].replace(",", "")) for option in options]
    assert len(options) >= 4 and rates == sorted(rates, reverse=True)
    assert [option for option in options if option.startswith("--mp 2: ")]


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(["7B", "13B", "llama3-8b", "llama3.2-1b", "smollm2-135m"]),
    st.sampled_from(["fp32", "fp16"]),
    st.integers(1, 40),
    st.integers(64, 2048),
    st.integers(1, 3),
    st.floats(0.8, 30),
)
def test_what_is_advised_fits_and_is_the_largest_that_does(size, dtype, batch, length, mp, gib) -> None:
    config, room = load_size(size), Device(int(gib * 2**30), 500e9, True)
    workload = Workload(dtype=dtype, batch_size=batch, seq_len=length)
    rows, positions = (find(config, mp, workload, room) for find in (max_batch_size, max_seq_len))
    if rows:
        assert fits(config, mp, replace(workload, batch_size=rows), room)
    assert not fits(config, mp, replace(workload, batch_size=rows + 1), room)
    if positions > 1:
        assert fits(config, mp, replace(workload, seq_len=positions), room)
    if fits(config, mp, workload, room):
        return
    options = advice(config, mp, workload, room)
    assert all(option.flags and option.memory.total_bytes <= room.room_bytes for option in options)
    assert len({option.flags for option in options}) == len(options)


def test_where_no_single_change_is_enough_several_are_advised() -> None:
    config, workload = load_size("65B"), Workload(dtype="fp16", batch_size=8)
    options = advice(config, 1, workload, Device(8 * 2**30, None, more_ranks_help=False))
    assert options and all("--quant" in o.flags and "--offload" in o.flags for o in options)
    assert advice(config, 1, workload, Device(2**30, None, more_ranks_help=False)) == []


def test_flags_of_a_change() -> None:
    before = Workload(dtype="fp32", batch_size=4)
    after = replace(before, dtype="fp16", quant="int4", offload="disk", batch_size=2, seq_len=100)
    assert (
        flags_of(1, before, 3, after) == "--mp 3 --dtype fp16 --quant int4 --offload disk --batch_size 2 --seq_len 100"
    )


def test_tokens_per_s_is_bandwidth_over_what_a_step_reads() -> None:
    config, device = load_size("7B"), Device(0, 1e12)
    embeddings = 2 * 32000 * 4096  # of which a step reads a row
    cache = 2 * 2 * 32 * 4096 * 2048
    read = 2 * 6738415616 - embeddings + cache
    assert tokens_per_s(config, 1, Workload(dtype="fp16"), device) == pytest.approx(1e12 / read)
    assert tokens_per_s(config, 2, Workload(dtype="fp16"), device) == pytest.approx(2e12 / read, rel=1e-4)
    blocks = 2 * 6738415616 - 2 * embeddings
    for offload, rate in (("cpu", 25e9), ("disk", 3e9)):
        found = tokens_per_s(config, 1, Workload(dtype="fp16", offload=offload), device)
        assert found == pytest.approx(rate / blocks, rel=1e-4)
    assert tokens_per_s(config, 1, Workload(dtype="fp16"), Device(0, None)) is None


# ---- checkpoints -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mha", "gqa", "tied", "heads-9-3"])
def test_headers_tell_of_a_checkpoint_what_its_tensors_do(tmp_path: Path, name: str, tokenizer_file: Path) -> None:
    config = MODELS[name]
    tensors = random_tensors(config)
    paths = [
        write_meta(tmp_path / "meta", config, tensors, 2),
        write_hf(tmp_path / "hf", hugging_face(config)),
        write_gguf(tmp_path / "model.gguf", config, tensors, gguf.GGMLQuantizationType.F16),
    ]
    for path in paths:
        found = checkpoint(path)
        told, known = whole_config(found), open_source(found).config
        for field in ("vocab_size", "tied_embeddings", "dim", "num_layers", "hidden_dim", "num_kv_heads"):
            assert getattr(told, field) == getattr(known, field), (path, field)


def test_a_checkpoint_is_planned_from_its_headers(tiny: Path) -> None:
    found = planned("--ckpt_dir", tiny, "--seq_len", "100", "--dtype", "fp32", "--mp", "2")
    memory = rank_memory(MODELS["gqa"], 2, Workload(dtype="fp32", seq_len=100))
    assert found["per_rank"]["weights_bytes"] == memory.weights_bytes
    assert found["disk_bytes"] == sum(file.stat().st_size for file in tiny.glob("*.pth"))


def test_llama_1_leaves_its_vocabulary_to_the_tokenizer(tiny: Path, tmp_path: Path) -> None:
    for file in tiny.iterdir():
        (tmp_path / file.name).symlink_to(file)
    params = json.loads((tiny / "params.json").read_text())
    (tmp_path / "params.json").unlink()
    (tmp_path / "params.json").write_text(json.dumps(params | {"vocab_size": -1}))
    there, known = (planned("--ckpt_dir", folder, "--seq_len", "9") for folder in (tmp_path, tiny))
    assert there["per_rank"] == known["per_rank"]


# ---- refusals, terminals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--size", "7B", "--mp", "33"], "use between 1 and 32 ranks"),
        (["--size", "7B", "--mp", "0"], "--mp is 0, but must be at least 1"),
        (["--size", "7C"], "--size 7C is not known; sizes: 7B, 13B"),
        (["--size", "7B", "--seq_len", "4096"], "--seq_len is 4096, above 2048, the context of 7B"),
        (["--size", "7B", "--gpu", "RTX 2081"], "--gpu RTX 2081 is not known; nearest: RTX 2080"),
        (["--gpu", "t4", "--vram_gib", "3"], "--gpu and --vram_gib are both given: drop one"),
        (["--size", "7B", "--ckpt_dir", "x"], "--size and --ckpt_dir are both given: drop one"),
        (["--gpu", "t4", "--dtype", "bf16"], "--dtype bf16, but Tesla T4 computes no bf16: use --dtype fp16"),
        (["--ckpt_dir", "/nowhere"], "no checkpoint at /nowhere"),
    ],
)
def test_wrong_requests_are_refused(flags: list[str], words: str) -> None:
    assert words in plan(*flags).refusal


def test_sizes_whose_context_is_too_short_are_named() -> None:
    done = plan("--seq_len", "8192")
    assert done.stderr.startswith("left out, their context is shorter than 8192: 7B, 13B, 33B, 65B, llama2-7b")
    assert "llama3-8b" in done.stdout and "llama2-7b" not in done.stdout


def test_colours_are_for_terminals() -> None:
    assert "\033[" not in plan("--gpu", "t4").stdout + plan("--size", "7B", "--gpu", "t4").stdout
    with Talk(sys.executable, PLAN, "--size", "7B", "--gpu", "2080") as terminal:
        terminal.expect("\033[31mdoes not fit\033[0m")
        assert terminal.end() == 0


def test_plan_flags_have_the_contracts_defaults() -> None:
    flags = PlanFlags()
    assert (flags.batch_size, flags.seq_len, flags.dtype, flags.quant, flags.offload) == (
        1,
        2048,
        "fp16",
        "none",
        "none",
    )
    assert plan_one(replace(flags, gpu="RTX 3090"), load_size("7B")).card is find_gpu("3090")


# ---- offload -----------------------------------------------------------------------------------------------------


def test_a_plan_leaves_as_many_blocks_on_a_card_as_fit_it() -> None:
    config, workload = load_size("7B"), Workload(dtype="fp16", offload="cpu")
    free = with_staying(config, 1, workload, Device(2**40, None))
    assert free.num_staying == 32 and rank_memory(config, 1, free) == rank_memory(config, 1, Workload(dtype="fp16"))
    room = Device(8 * 10**9, 448e9)
    some = with_staying(config, 1, workload, room)
    assert 0 < some.num_staying < 30 and fits(config, 1, some, room)
    assert not fits(config, 1, replace(some, num_staying=some.num_staying + 1), room)
    assert tokens_per_s(config, 1, some, room) > tokens_per_s(config, 1, workload, room)
    small = Device(10**9, 448e9)
    assert with_staying(config, 1, workload, small).num_staying == 0 and not fits(config, 1, workload, small)
    found = planned("--size", "7B", "--offload", "cpu", "--vram_gib", "8")
    assert found["fits"] and 7.5 * 2**30 < found["per_rank"]["total_bytes"] <= 8 * 2**30
