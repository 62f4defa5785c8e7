"""Blocks that wait elsewhere: the same tokens as with all of them on the device, whatever stays there and breaks."""

import os
import threading
import weakref
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import islice, pairwise
from pathlib import Path

import jobs
import pytest
import torch
from factory import MODELS, hugging_face, meta_tensors, write_meta
from fake_streams import Gpu
from ranks import Ranks
from torch import nn

from llama_mp import LLM, stream
from llama_mp.budget import GIB, Fitting, on_device_bytes
from llama_mp.config import RunConfig
from llama_mp.errors import RequestError, RunError
from llama_mp.memory import rank_memory
from llama_mp.stream import CudaCarrier, CudaDiskCarrier, Packing, Streamed, spread

CPU = torch.device("cpu")
CONFIG = replace(MODELS["gqa"], name="deep", num_layers=7)
SHAPE = (3, 40)  # of the cache: slots, positions
FLAGS = {"max_batch_size": SHAPE[0], "max_seq_len": SHAPE[1]}
PROMPTS = [[1, 17, 300, 4, 250], [5, 6], [99, 42, 330, 5, 6, 7, 8, 9, 10]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_meta(tmp_path_factory.mktemp("deep"), CONFIG, meta_tensors(hugging_face(CONFIG)), 2)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "llama-mp" / "blocks"


def gib(place: str, num_staying: int, mp: int = 1, quant: str = "none") -> float:
    """The least --device_memory_gib with which so many blocks stay."""
    fitting = Fitting(RunConfig(offload=place, quant=quant), CONFIG, mp, "fp32", "cpu", num_staying)
    return (on_device_bytes(CONFIG, mp, fitting.workload(SHAPE)) + 1) / GIB


def tokens_of(llm: LLM) -> list[list[int]]:
    leader = jobs.Leader(llm.prepare(SHAPE), llm.world)
    greedy = jobs.SamplingConfig(max_gen_len=8, temperature=0)
    return [request.tokens for request in jobs.complete(leader, PROMPTS, [greedy] * len(PROMPTS))]


def opened(folder: Path, tokenizer: Path, place: str, num_staying: int = 0, **flags: object) -> LLM:
    flags = FLAGS | {"offload": place, "device_memory_gib": gib(place, num_staying)} | flags
    return LLM(folder, tokenizer=tokenizer, dtype="fp32", device="cpu", **flags)


@pytest.fixture(scope="module")
def expected(folder: Path, tokenizer_file: Path) -> list[list[int]]:
    with LLM(folder, tokenizer=tokenizer_file, dtype="fp32", device="cpu", **FLAGS) as llm:
        return tokens_of(llm)


# ---- tokens ------------------------------------------------------------------------------------------------------


def streamed_batch(folder: Path, tokenizer: Path, cache: str, runs: list[dict]) -> list | None:
    """In a rank: for each run's flags, the blocks that come and go, and the tokens of the prompts."""
    os.environ["XDG_CACHE_HOME"] = cache
    found = []
    for flags in runs:
        world = jobs.connect(RunConfig(device="cpu"))
        llm = jobs.load(world, folder, tokenizer, **FLAGS, **flags)
        order = llm.model.layers.order if isinstance(llm.model.layers, Streamed) else []
        runner = llm.prepare(SHAPE)
        if world.is_leader:
            leader = jobs.Leader(runner, world)
            samplings = [jobs.SamplingConfig(max_gen_len=8, temperature=0)] * len(PROMPTS)
            found.append((order, [request.tokens for request in jobs.complete(leader, PROMPTS, samplings)]))
            leader.stop()
        else:
            jobs.follow(runner)
        llm.close()
    return found


BUDGETS = [("cpu", 0), ("cpu", 3), ("cpu", 7), ("disk", 0), ("disk", 2)]


@pytest.mark.parametrize(("mp", "budgets"), [(1, BUDGETS), (2, BUDGETS[::4]), (3, BUDGETS[1:4:2])])
def test_tokens_are_those_of_a_resident_model(
    ranks: Ranks, folder: Path, tokenizer_file: Path, tmp_path: Path, expected: list[list[int]], mp: int, budgets: list
) -> None:
    runs = [{"offload": place, "device_memory_gib": gib(place, stay, mp)} for place, stay in budgets]
    found = ranks.run(mp, streamed_batch, folder=folder, tokenizer=tokenizer_file, cache=str(tmp_path), runs=runs)[0]
    assert [len(order) for order, _ in found] == [CONFIG.num_layers - stay for _, stay in budgets]
    assert [tokens for _, tokens in found] == [expected] * len(found)


@pytest.mark.parametrize(("mp", "quant"), [(1, "int8"), (1, "int4"), (2, "int8")])
def test_fewer_bits_give_the_same_tokens_too(
    ranks: Ranks, folder: Path, tokenizer_file: Path, tmp_path: Path, mp: int, quant: str
) -> None:
    limit = {"device_memory_gib": gib("cpu", 1, mp, quant)}
    runs = [{}, *({"offload": place} | limit for place in ("cpu", "disk", "disk"))]
    runs = [flags | {"quant": quant} for flags in runs]
    found = ranks.run(mp, streamed_batch, folder=folder, tokenizer=tokenizer_file, cache=str(tmp_path), runs=runs)[0]
    assert [bool(order) for order, _ in found] == [False, True, True, True]
    assert len({str(tokens) for _, tokens in found}) == 1


def test_ranks_load_together_where_one_of_them_lost_its_file(
    ranks: Ranks, folder: Path, tokenizer_file: Path, tmp_path: Path, expected: list[list[int]]
) -> None:
    runs = [{"offload": "disk", "device_memory_gib": gib("disk", 1, 2)}]
    arguments = {"folder": folder, "tokenizer": tokenizer_file, "cache": str(tmp_path), "runs": runs}
    for _ in range(2):
        assert [tokens for _, tokens in ranks.run(2, streamed_batch, **arguments)[0]] == [expected]
        first, second = (tmp_path / "llama-mp" / "blocks").iterdir()
        os.truncate(first / "blocks", 100)
    assert (second / "index.json").exists()


def test_bf16_gives_the_same_tokens_too(folder: Path, tokenizer_file: Path, cache: Path) -> None:
    found = []
    for place, limit in (("none", None), ("cpu", gib("cpu", 0)), ("disk", gib("disk", 0))):
        flags = FLAGS | {"offload": place, "device_memory_gib": limit and limit * 0.75}
        with LLM(folder, tokenizer=tokenizer_file, dtype="bf16", device="cpu", **flags) as llm:
            assert isinstance(llm.model.layers, Streamed) == (place != "none")
            found.append(tokens_of(llm))
    assert found[0] == found[1] == found[2]


def test_a_pass_that_was_broken_off_does_no_harm(
    folder: Path, tokenizer_file: Path, cache: Path, expected: list[list[int]]
) -> None:
    for place in ("cpu", "disk"):
        with opened(folder, tokenizer_file, place, 1) as llm:
            for num_blocks in range(1, CONFIG.num_layers):
                for _ in zip(range(num_blocks), llm.model.layers, strict=False):
                    pass
            assert tokens_of(llm) == expected


# ---- what is held ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("place", "num_staying"), [("cpu", 0), ("cpu", 4), ("disk", 0), ("disk", 4), ("cpu", 7)])
def test_weights_are_held_as_planned(
    folder: Path, tokenizer_file: Path, cache: Path, place: str, num_staying: int
) -> None:
    with opened(folder, tokenizer_file, place, num_staying) as llm:
        storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in llm.model.parameters()}
        waiting = llm.store.waiting.values() if place == "cpu" and llm.store else ()
        held = sum(storages.values()) + sum(flat.nbytes for flat in waiting)
        workload = llm.fitting.workload(SHAPE)
        assert workload.num_staying == num_staying
        assert held == rank_memory(CONFIG, 1, workload).weights_bytes
        whole = llm.loaded.weight_bytes
    with LLM(folder, tokenizer=tokenizer_file, dtype="fp32", device="cpu") as llm:
        assert whole == llm.loaded.weight_bytes


def test_nothing_is_left_after_close(folder: Path, tokenizer_file: Path, cache: Path) -> None:
    for place in ("cpu", "disk"):
        with opened(folder, tokenizer_file, place) as llm:
            tokens_of(llm)
            assert any("blocks" in thread.name for thread in threading.enumerate())
            flats = [weakref.ref(slot.flat) for slot in llm.model.layers.slots]
            flats += [weakref.ref(flat) for flat in llm.store.waiting.values()] if place == "cpu" else []
        assert not [flat for flat in flats if flat() is not None]
        assert not [thread for thread in threading.enumerate() if "blocks" in thread.name]


# ---- the file on disk --------------------------------------------------------------------------------------------


def test_the_file_is_found_again_and_serves_any_budget(
    folder: Path, tokenizer_file: Path, cache: Path, expected: list[list[int]]
) -> None:
    read = []
    for num_staying in (0, 0, 3):
        with opened(folder, tokenizer_file, "disk", num_staying) as llm:
            assert tokens_of(llm) == expected
            read.append(llm.loaded.bytes_read)
    assert read[0] > 3 * read[1] and read[1] == read[2]
    assert len(list(cache.iterdir())) == 1


def damage(file: Path, at: int) -> None:
    with file.open("r+b") as opened_file:
        opened_file.seek(at)
        byte = opened_file.read(1)
        opened_file.seek(at)
        opened_file.write(bytes([byte[0] ^ 1]))


def test_a_damaged_block_is_never_computed_with(
    folder: Path, tokenizer_file: Path, cache: Path, expected: list[list[int]]
) -> None:
    with opened(folder, tokenizer_file, "disk") as llm:
        stride = llm.store.file.stride
    [kept] = cache.iterdir()
    for block in (0, 5):
        damage(kept / "blocks", block * stride + 1000)
        with opened(folder, tokenizer_file, "disk") as llm, pytest.raises(RunError, match=f"damaged in block {block}"):
            tokens_of(llm)
        with opened(folder, tokenizer_file, "disk") as llm:
            assert tokens_of(llm) == expected


def test_a_file_that_is_not_whole_is_written_anew(
    folder: Path, tokenizer_file: Path, cache: Path, expected: list[list[int]]
) -> None:
    with opened(folder, tokenizer_file, "disk"):
        [kept] = cache.iterdir()
    for spoil in (
        lambda: os.truncate(kept / "blocks", 5000),
        lambda: (kept / "index.json").write_text("{"),
        lambda: (kept / "index.json").write_text("[]"),
        lambda: (kept / "blocks").unlink(),
    ):
        spoil()
        with opened(folder, tokenizer_file, "disk") as llm:
            assert tokens_of(llm) == expected


def test_another_checkpoint_has_another_file(folder: Path, tokenizer_file: Path, cache: Path, tmp_path: Path) -> None:
    other = write_meta(tmp_path / "other", CONFIG, meta_tensors(hugging_face(CONFIG, seed=1)), 2)
    with opened(folder, tokenizer_file, "disk"), pytest.raises(RequestError, match="open already"):
        opened(other, tokenizer_file, "disk")
    with opened(other, tokenizer_file, "disk") as llm:
        tokens = tokens_of(llm)
    assert len(list(cache.iterdir())) == 2
    shard = next(other.glob("*.pth"))
    os.utime(shard, ns=(0, 0))
    with opened(other, tokenizer_file, "disk") as llm:
        assert tokens_of(llm) == tokens
    assert len(list(cache.iterdir())) == 3


# ---- order on a GPU ------------------------------------------------------------------------------------------------


class FakeSlot:
    """`flat` is a number on the GPU: the block that lies there; -1 while it is being copied."""

    gpu: Gpu

    def __init__(self, block: nn.Module, packing: Packing, device: torch.device) -> None:
        self.block, self.flat, self.holds = nn.Identity(), self, None
        self.block.slot = [self]

    def copy_(self, buffer: torch.Tensor, non_blocking: bool) -> None:
        def end() -> None:
            self.holds = int(buffer[0])

        def begin() -> None:
            self.holds = -1

        assert non_blocking
        self.gpu.enqueue(begin)
        self.gpu.enqueue(end)


def from_disk(index: int, flat: torch.Tensor) -> None:
    flat.fill_(255)  # while it is read, there is no block
    flat.fill_(index)


@pytest.fixture(params=["host", "disk"])
def carried(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Gpu, Streamed]]]:
    """Streamed blocks of 3, 4 and 7 layers on GPUs that work in many different orders."""
    monkeypatch.setattr(stream, "Slot", FakeSlot)
    packing = Packing.of({"weight": torch.zeros(1)})
    device = torch.device("cuda")

    def made(seed: int) -> tuple[Gpu, Streamed]:
        gpu = FakeSlot.gpu = Gpu(seed)
        gpu.patch(monkeypatch)
        monkeypatch.setattr(stream, "host_buffer", lambda num_bytes, device: torch.empty(num_bytes, dtype=torch.uint8))
        count = (3, 4, 7)[seed % 3]
        if request.param == "host":
            carrier = CudaCarrier({i: torch.full((64,), i, dtype=torch.uint8) for i in range(count)}, device)
        else:
            carrier = CudaDiskCarrier(from_disk, device, packing.num_bytes)
        return gpu, Streamed([nn.Identity() for _ in range(count)], packing, {}, carrier, device)

    yield map(made, range(30))


def test_on_a_gpu_each_block_is_there_while_it_computes(carried) -> None:
    for gpu, layers in carried:
        seen: list[tuple[int, int]] = []

        def compute(index: int, block: nn.Module, seen: list[tuple[int, int]] = seen) -> None:
            seen.append((index, block.slot[0].holds))

        count = len(layers.order)
        broken_off = gpu.random.randrange(1, count)
        for num_blocks in (None, broken_off, None, None):
            for index, block in islice(enumerate(layers), num_blocks):
                for _ in range(2):  # pieces of work, between which other streams do theirs
                    gpu.computing.enqueue(partial(compute, index, block))
                for _ in range(gpu.random.randrange(6)):
                    gpu.advance()
        layers.close()
        assert not layers.carrier.stream.work  # nothing writes to a slot, or reads a buffer, that is freed now
        gpu.synchronize()
        assert len(seen) == 2 * (3 * count + broken_off)
        assert [index for index, _ in seen] == [held for _, held in seen]


# ---- parts -------------------------------------------------------------------------------------------------------


def test_a_block_is_packed_as_bytes_of_any_type() -> None:
    parameters = {
        "codes": torch.arange(-10, 11, dtype=torch.int8).view(3, 7),
        "scales": torch.rand(5).half(),
        "packed.weight": torch.arange(40, dtype=torch.uint8).view(2, 20),
        "norm": torch.rand(9),
    }
    packing = Packing.from_json(Packing.of(parameters).as_json())
    assert packing == Packing.of(parameters)
    assert packing.num_bytes % 64 == 0 and packing.parameter_bytes == sum(p.nbytes for p in parameters.values())
    flat = torch.empty(packing.num_bytes, dtype=torch.uint8)
    packing.fill(flat, parameters)
    for name, view in packing.views(flat.clone()).items():
        assert view.dtype is parameters[name].dtype and torch.equal(view, parameters[name])
        assert view.data_ptr() % 64 == 0


def test_blocks_that_stay_are_spread_among_those_that_come() -> None:
    assert spread(6, 6) == [0, 1, 2, 3, 4, 5]
    assert spread(6, 3) == [1, 3, 5]
    assert spread(4, 0) == []
    for num_layers in (5, 32):
        for count in range(num_layers + 1):
            chosen = spread(num_layers, count)
            gaps = [b - a for a, b in pairwise(chosen)]
            assert len(chosen) == count and (not gaps or max(gaps) - min(gaps) <= 1)
