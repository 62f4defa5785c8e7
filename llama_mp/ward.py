"""All ranks in step with each other while they are examined: none of them may hang the others.

Each rank does a step in a thread that is given up after the limit, and tells its result through torchrun's store, which
needs nothing of what is examined. Who tells nothing is named.
"""

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from llama_mp import deaths
from llama_mp.errors import RunError
from llama_mp.machine import threads_per_rank
from llama_mp.pinning import unpin
from llama_mp.world import World

GRACE_S = 1.0  # for what a rank tells when it has given a step up
LONGEST_POLL_S = 0.01


class Told(NamedTuple):
    """What one rank tells of a step; `trouble`: why there is no result."""

    result: Any
    trouble: str | None
    is_late: bool = False  # the trouble is a wait, for which another rank may be the cause


def cause(told: Mapping[int, Told]) -> tuple[int, str] | None:
    """The rank whose trouble explains those of the others, and that trouble; None when all is well."""
    troubled = sorted((one.is_late, rank) for rank, one in told.items() if one.trouble)
    return (troubled[0][1], told[troubled[0][1]].trouble) if troubled else None


class Silence(RunError):
    """Ranks that tell nothing of a step in its limit, without which there is no other step."""

    def __init__(self, ranks: Sequence[int], step: str) -> None:
        super().__init__(f"no answer in {step}")
        self.ranks, self.step = ranks, step


class Patient(NamedTuple):
    """A rank's process, which its host's survivors end when it is silent."""

    host: str
    pid: int
    born: str


class Ward:
    """All ranks, in step with each other."""

    def __init__(self, world: World, limit_s: float) -> None:
        self.world, self.limit_s, self.num_steps = world, limit_s, 0
        self.patients: list[Patient | None] = [None] * world.size

    def together(self, step: str, work: Callable[[], Any], limit_s: float | None = None) -> dict[int, Told]:
        """By rank what `work` returns there, as JSON carries it. Raises Silence when a rank tells nothing."""
        limit_s = limit_s or self.limit_s
        deadline = time.monotonic() + limit_s + GRACE_S
        try:
            told = Told(within(limit_s, work, self.world.device), None)
        except TimeoutError:
            told = Told(None, f"no end after {limit_s:g} s", is_late=True)
        except Exception as error:  # what goes wrong here is what is looked for
            told = Told(None, str(error).split("\n")[0] or type(error).__name__)
        if self.world.size == 1:
            return {0: told}
        self.num_steps += 1
        keys = [f"doctor/{self.num_steps}/{rank}" for rank in range(self.world.size)]
        self.world.store.set(keys[self.world.rank], json.dumps(told))
        if missing := self.missing(keys, deadline):
            raise Silence(missing, step)
        return {rank: Told(*json.loads(text)) for rank, text in enumerate(self.world.store.multi_get(keys))}

    def missing(self, keys: list[str], deadline: float) -> list[int]:
        """The ranks whose keys do not come; those that are known to be gone are not waited for."""
        pause = 0.001
        while not self.world.store.check(keys):
            is_late = time.monotonic() > deadline
            if is_late or self.gone():
                silent = [rank for rank, key in enumerate(keys) if not self.world.store.check([key])]
                if is_late or set(silent) <= set(self.gone()):
                    return silent
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_POLL_S)
        return []

    def wait_for(self, key: str, limit_s: float) -> None:
        """Returns after the limit too."""
        deadline = time.monotonic() + limit_s
        while not self.world.store.check([key]) and time.monotonic() < deadline:
            time.sleep(LONGEST_POLL_S)

    def beside(self) -> dict[int, Patient]:
        """The ranks of this host, as far as they are known."""
        own = self.patients[self.world.rank]
        return {rank: one for rank, one in enumerate(self.patients) if one and own and one.host == own.host}

    def gone(self) -> list[int]:
        return [rank for rank, one in self.beside().items() if not deaths.is_here(one.pid, one.born)]

    def why_silent(self, rank: int) -> str:
        if rank in self.gone():
            return "its process was killed, or ended by an error of its own"
        one = self.beside().get(rank)
        return deaths.why_still(one.pid) if one else "its process or its machine is gone, stopped or cut off"

    def end_silent(self, ranks: Sequence[int]) -> None:
        """Those of this host: torchrun would wait half a minute for one that is stopped."""
        for rank in set(ranks) & set(self.beside()):
            deaths.end(self.patients[rank].pid, self.patients[rank].born, signal.SIGKILL)

    def hear_torchrun(self) -> None:
        """When a rank has ended torchrun sends SIGTERM to the others, which then report that; else it ends them."""

        def answer(number: int, frame: object) -> None:
            if not self.gone():
                os._exit(128 + number)

        signal.signal(signal.SIGTERM, answer)


def within(limit_s: float, work: Callable[[], Any], device: torch.device) -> Any:
    """Raises TimeoutError when `work` takes longer; it goes on in its thread, which ends with the process."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            with streamed(device):
                future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future.result(limit_s)


@contextlib.contextmanager
def streamed(device: torch.device) -> Iterator[None]:
    """The device of this thread, and on a GPU a stream of its own: what hangs in another one does not matter."""
    if device.type == "cpu":
        yield
        return
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
        yield


def enter(limit_s: float) -> Ward:
    """The world that torchrun describes, without any group: whether there can be one is a question."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    torch.set_num_threads(threads_per_rank(local_size))
    store = dist.HashStore() if size == 1 else next(dist.rendezvous("env://"))[0]
    if size > 1:
        store = dist.PrefixStore(f"doctor/{store.add(f'doctor/worlds_of/{rank}', 1)}", store)
    cpu = torch.device("cpu")
    return Ward(World(rank=rank, size=size, device=cpu, store=store, local_size=local_size), limit_s)


def close() -> None:
    unpin()
    if dist.is_initialized():
        dist.destroy_process_group()
