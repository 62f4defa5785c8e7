"""What runs on a GPU, on one that is not there: nothing waits for it, and nothing is left in main memory."""

from collections import Counter
from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from factory import MODELS
from fairscale.nn.model_parallel.initialize import initialize_model_parallel
from fake_cuda import DEVICE, Waits, Watch, fake_cuda, fill, our_kernels
from ranks import alone
from torch.testing._internal.distributed.fake_pg import FakeStore

from llama_mp import sampling
from llama_mp.cache import KVCache
from llama_mp.config import ModelConfig, SamplingConfig
from llama_mp.engine import Engine, Seat
from llama_mp.graphs import GraphRunner
from llama_mp.model import build
from llama_mp.quant import largest_of_rows, pack
from llama_mp.request import Request
from llama_mp.runner import Leader, Runner
from llama_mp.world import World

NUM_SLOTS, MAX_SEQ_LEN = 5, 64
KINDS = (("gqa", torch.bfloat16, "none"), ("tied", torch.float32, "int8"), ("gqa", torch.bfloat16, "int4"))
SAMPLINGS = [
    SamplingConfig(temperature=0),
    SamplingConfig(temperature=0.7, top_p=0.9),
    SamplingConfig(temperature=1.0, top_k=20, min_p=0.1, logprobs=True),
    SamplingConfig(temperature=0, repetition_penalty=1.3),
]


# ---- the fake itself -----------------------------------------------------------------------------------------------

WAITING = {
    "a value": lambda x: x[0].item(),
    "values": lambda x: x.tolist(),
    "a truth": lambda x: bool((x > 0).all()),
    "a mask": lambda x: x[x > 0],
    "a copy back": lambda x: x.cpu(),
    "a copy of a list": lambda x: x + torch.tensor([1.0, 2.0, 3.0], device=DEVICE),
    "a copy that is queued, but not pinned": lambda x: x.copy_(torch.zeros(3), non_blocking=True),
    "a copy that is pinned, but not queued": lambda x: x.copy_(torch.zeros(3, pin_memory=True)),
    "a list of indices": lambda x: x[[0, 2]],
    "indices in main memory": lambda x: x[torch.tensor([0, 2])],
    "two devices": lambda x: x + torch.zeros(3),
    "an event": lambda x: torch.cuda.Event().synchronize(),
}


@pytest.mark.parametrize("act", WAITING.values(), ids=WAITING)
def test_the_fake_refuses(act: Callable[[torch.Tensor], object]) -> None:
    with fake_cuda(), torch.inference_mode():
        x = torch.zeros(3, device=DEVICE)
        with Watch(), pytest.raises((Waits, RuntimeError)):
            act(x)


def test_the_fake_lets_pass_what_is_queued() -> None:
    with fake_cuda(), Watch():
        x = torch.zeros(3, device=DEVICE)
        x += torch.tensor([1.0, 2.0, 3.0], pin_memory=True).to(DEVICE, non_blocking=True)
        x[1] = 2.0
        x[x.argsort()] = 1.0
        host = torch.empty(3, pin_memory=True).copy_(x, non_blocking=True)
        assert x.device == DEVICE and host.device.type == "cpu"
    assert torch.zeros(3)[0] == 0  # the real one is back


# ---- passes --------------------------------------------------------------------------------------------------------


class AtOnce:
    """In place of a recorder of CUDA graphs: a step is launched as it is."""

    def warm_up(self, launch: Callable[[], None]) -> None:
        launch()

    def record(self, launch: Callable[[], None]) -> Callable[[], None]:
        return launch

    def close(self) -> None:
        pass


def made(config: ModelConfig, mp: int, quant: str, dtype: torch.dtype, *, graphs: bool) -> Runner:
    model = build(config, mp, quant, dtype)
    fill(model, dtype)
    cache = KVCache.allocate(config, mp, num_slots=NUM_SLOTS, max_seq_len=MAX_SEQ_LEN, dtype=dtype, device=DEVICE)
    return GraphRunner(config, model, cache, AtOnce()) if graphs else Runner(config, model, cache)


def launch(runner: Runner, world: World) -> list[torch.Tensor]:
    """A prompt in two passes, which stands for those of four rows; a step of one row, three of four; a row that moves.
    What all this leaves: on rank 0 the last of it in main memory."""
    runner.prefill([1, 2, 3], slot=0, start=0, all_logits=False)
    logits_NV = runner.prefill([4, 5], slot=0, start=3, all_logits=True)
    runner.decode([5])
    if not world.is_leader:
        for _ in range(3):
            runner.decode([5, 6, 7, 8])
        runner.move(3, 1, 9)
        return [runner.tokens_S, *runner.cache.keys]
    engine = Engine(Leader(runner, world), eos_ids=frozenset(), depth=2)
    for slot, chosen in enumerate(SAMPLINGS):
        request = Request(id=str(slot), prompt=list(range(1, 6 + slot)), sampling=chosen, tokens=[7])
        engine.seen.begin(slot, request, logits_NV)
        engine.running.append(Seat(request=request, num_chosen=1))
    for _ in range(3):  # warm-up, recording, replay
        engine.launch()
    engine.runner.move(3, 1, 9)
    engine.seen.move(3, 1)
    return [runner.tokens_S, engine.seen.mask_SV, *(flight.tokens.host for flight in engine.flights)]


def devices(rank: int, mp: int) -> list[list[str]]:
    """Of what remains on one rank; the others are not there."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=mp)
    initialize_model_parallel(mp, model_parallel_backend="fake")
    world, found = World(rank=rank, size=mp, device=DEVICE, store=FakeStore()), []
    for name, dtype, quant in KINDS:
        with fake_cuda():
            runner = made(MODELS[name], mp, quant, dtype, graphs=quant != "none")
            with Watch(), patch.object(sampling, "FEW", 100):  # fewer candidates than tokens
                found.append([str(x.device) for x in launch(runner, world)])
    world.close()
    return found


def devices_of_ranks() -> tuple[list[list[list[str]]], Counter[str]]:
    """Runs in a process of its own, which has no group yet: with torch's operations, and with our own kernels, and how
    often these were launched."""
    places = [(0, 1), (0, 4), (1, 4)]
    found = [devices(rank, mp) for rank, mp in places]
    with our_kernels() as launched:
        return found + [devices(rank, mp) for rank, mp in places], launched


def test_no_pass_waits_for_the_device() -> None:
    first, other = ["cuda:0", "cuda:0", "cpu", "cpu", "cpu"], ["cuda:0", "cuda:0", "cuda:0"]
    found, launched = alone(devices_of_ranks)
    assert found == 2 * [[first] * 3, [first] * 3, [other] * 3]
    num_steps, num_ranks, num_layers = 4, 3, 2
    assert launched["attend"] == num_steps * num_layers * num_ranks * len(KINDS)


@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_quantizing_waits_for_nothing(quant: str) -> None:
    with fake_cuda(), Watch():
        matrix = torch.empty(10, 70, dtype=torch.bfloat16, device=DEVICE)
        assert pack(matrix, quant).device == DEVICE
        assert quant == "int4" or pack(matrix, quant, largest_of_rows(matrix)).device == DEVICE
