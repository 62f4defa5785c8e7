"""What the flags of offloading allow, what is refused, and what a process really takes."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from factory import random_tensors, write_meta
from running import ROOT, infer, run

from llama_mp import budget
from llama_mp.budget import GIB, Fitting
from llama_mp.config import ModelConfig, RunConfig, load_size
from llama_mp.errors import RequestError
from llama_mp.fit import Room
from llama_mp.layout import global_shapes
from llama_mp.memory import device_weight_bytes, num_streamed, parameters, rank_memory, waiting_bytes
from llama_mp.runtime import later_bytes

SEVEN = load_size("7B")
SHAPE = (2, 1024)
EMPTY_CARD, FULL_HOST = Room(80 * GIB, "on cuda:0", is_shared=False), 1 << 50


def fitting(device: str = "cuda", config: ModelConfig = SEVEN, **flags: object) -> Fitting:
    return Fitting(RunConfig(**flags), config, 1, "fp16", device)


def check(fit: Fitting, room: Room = EMPTY_CARD) -> None:
    fit.settle(SHAPE, room)
    fit.check(SHAPE, room, 1, has_weights=False)


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Free main memory."""
    free = [FULL_HOST]
    monkeypatch.setattr(budget, "free_host_bytes", lambda: free[0])
    return free


# ---- how many blocks stay ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("limit_gib", "free_gib"), [(None, 8), (8, 80), (8, 7), (6, 8)])
def test_as_many_blocks_stay_as_the_flag_and_free_memory_hold(limit_gib: float | None, free_gib: int) -> None:
    fit = fitting(offload="cpu", device_memory_gib=limit_gib)
    check(fit, Room(free_gib * GIB, "on cuda:0", is_shared=False))
    allowed = min((limit_gib or free_gib) * GIB, free_gib * GIB - later_bytes(1, "cuda"))
    taken = rank_memory(SEVEN, 1, fit.workload(SHAPE)).allocated_bytes
    block = parameters(SEVEN, 0, 1, "none", "fp16").buffer
    assert fit.num_staying > 0 and allowed - block < taken <= allowed


def test_a_model_that_fits_stays_whole() -> None:
    for place in ("cpu", "disk"):
        fit = fitting(offload=place)
        check(fit)
        workload = fit.workload(SHAPE)
        assert num_streamed(SEVEN, workload) == 0 == waiting_bytes(SEVEN, 1, workload)
        assert device_weight_bytes(SEVEN, 1, workload) == 2 * 6738415616


def test_blocks_for_which_there_are_slots_do_not_come_and_go() -> None:
    for num_layers in (1, 2, 3):
        config = replace(SEVEN, num_layers=num_layers)
        streamed = [
            num_streamed(config, replace(fitting(offload="cpu").workload(SHAPE), num_staying=n))
            for n in range(num_layers + 1)
        ]
        assert streamed == ([3, 0, 0, 0] if num_layers == 3 else [0] * (num_layers + 1))


# ---- what is refused ---------------------------------------------------------------------------------------------


def test_a_budget_without_room_for_two_blocks_is_refused_with_the_least_that_has() -> None:
    fit = fitting(offload="cpu", device_memory_gib=2)
    with pytest.raises(RequestError) as refused:
        check(fit)
    found = re.fullmatch(
        r"--device_memory_gib 2 is too little for 7B over 1 rank in fp16: 2 blocks, the rest of the model and 2 x 1024 "
        r"tokens of cache take (\S+) GiB a rank; give --device_memory_gib (\S+), or lower --max_batch_size, "
        r"--max_seq_len",
        str(refused.value),
    )
    least = float(found[1])
    assert found[1] == found[2]
    check(fitting(offload="cpu", device_memory_gib=least))
    with pytest.raises(RequestError, match="too little"):
        check(fitting(offload="cpu", device_memory_gib=least - 0.001))


def test_blocks_that_main_memory_does_not_hold_are_refused(host: list[int]) -> None:
    flags = {"offload": "cpu", "device_memory_gib": 4}
    with pytest.raises(RequestError) as refused:
        check(fitting(host_memory_gib=8, **flags))
    found = re.fullmatch(
        r"--host_memory_gib 8 is too little for 7B over 1 rank in fp16: blocks that pass through main memory take "
        r"(\S+) GiB a rank; give --host_memory_gib (\S+), or --offload disk",
        str(refused.value),
    )
    check(fitting(host_memory_gib=float(found[2]), **flags))
    host[0] = 8 * GIB
    with pytest.raises(RequestError, match=r"too little main memory .* and 8 are free; free some, or --offload disk"):
        check(fitting(**flags))
    check(fitting(force=True, **flags))
    check(fitting(offload="disk", device_memory_gib=4))  # two blocks on their way are all that is there


def test_on_a_cpu_both_flags_bound_the_blocks_of_a_disk() -> None:
    for flags in ({"host_memory_gib": 6}, {"device_memory_gib": 6}, {"host_memory_gib": 6, "device_memory_gib": 9}):
        fit = fitting("cpu", offload="disk", **flags)
        check(fit)
        memory = rank_memory(SEVEN, 1, fit.workload(SHAPE))
        assert 5.5 * GIB < memory.allocated_bytes <= 6 * GIB
    with pytest.raises(RequestError, match=r"--host_memory_gib 1 is too little .*; give --host_memory_gib "):
        check(fitting("cpu", offload="disk", host_memory_gib=1))


def test_a_larger_cache_than_was_reckoned_with_is_refused() -> None:
    fit = fitting(offload="cpu", device_memory_gib=6)
    check(fit)
    with pytest.raises(RequestError, match=r"\d+ blocks, the rest of the model and 8 x 2048 tokens of cache take"):
        fit.check((8, 2048), EMPTY_CARD, 1, has_weights=True)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"device_memory_gib": 4}, "--device_memory_gib is for blocks that wait elsewhere: give --offload"),
        ({"host_memory_gib": 4}, "--host_memory_gib is for blocks that wait elsewhere: give --offload"),
        ({"offload": "cpu", "device_memory_gib": 0}, "--device_memory_gib is 0, but must be above 0"),
        ({"offload": "disk", "host_memory_gib": -1.5}, "--host_memory_gib is -1.5, but must be above 0"),
    ],
)
def test_flags_that_make_no_sense_are_refused(flags: dict, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        RunConfig(**flags)


def test_the_command_refuses_before_weights_are_read(tiny: Path) -> None:
    flags = ("--ckpt_dir", tiny, "--device", "cpu", "--prompt", "a")
    said = infer(*flags, "--offload", "disk", "--host_memory_gib", "0.0001").refusal
    assert said.startswith("--host_memory_gib 0.0001 is too little for gqa over 1 rank in fp32: ")


# ---- in use ------------------------------------------------------------------------------------------------------

# A process for each run: what an earlier one left there would hide what the next one takes.
SCRIPT = """
import json, os, sys
from pathlib import Path
from llama_mp.config import RunConfig, SamplingConfig
from llama_mp.llm import LLM
from llama_mp.locate import locate_weights
from llama_mp.parallel import connect
from llama_mp.request import Request
for flags in json.loads(sys.argv[1]):
    if child := os.fork():
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        continue
    run = RunConfig(ckpt_dir=Path(sys.argv[2]), dtype="fp32", device="cpu", max_seq_len=32, max_batch_size=1, **flags)
    with LLM.of_checkpoint(run, locate_weights(run), connect(run), codec=None) as llm:
        request = Request(id="0", prompt=list(range(16)), sampling=SamplingConfig(temperature=0, max_gen_len=3))
        for _ in llm.serve([request], (1, 32), frozenset()):
            pass
        read = llm.peak_memory.read()
        print(json.dumps([request.tokens, read, llm.planned.allocated_bytes, llm.loaded.weight_bytes]))
    break
"""


def test_a_model_of_three_times_the_budget_runs_within_it_from_the_disk(tmp_path: Path) -> None:
    shape = {"dim": 512, "num_layers": 12, "num_heads": 8, "num_kv_heads": 4, "hidden_dim": 2560, "vocab_size": 500}
    config, limit = ModelConfig(name="deep", embedding_axis=0, **shape), 72 << 20
    block = random_tensors(replace(config, num_layers=1), torch.bfloat16)
    tensors = {name: block[re.sub(r"layers\.\d+", "layers.0", name)] for name in global_shapes(config)}
    write_meta(tmp_path / "deep", config, tensors, 1)
    from_disk = {"offload": "disk", "host_memory_gib": limit / GIB}
    runs = json.dumps([from_disk, from_disk])  # the file is written, then found
    env = {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = run(sys.executable, "-c", SCRIPT, runs, tmp_path / "deep", **env)
    assert done.code == 0, done.stderr
    first, second = map(json.loads, done.stdout.splitlines())
    assert first[0] == second[0]
    for _, peak, planned, weights in (first, second):
        assert weights > 3 * limit
        assert 0.7 * limit < planned <= limit
        assert peak <= 1.1 * limit
