"""Processes forked from a server that has imported torch and run none of it: a pool of ranks, and single ones.

torchrun takes 20 s to start 8 ranks on 2 cores; these are there in a fraction of a second, and run job after job.
"""

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from torch.distributed import TCPStore

NUM_RANKS = 8
JOB_TIMEOUT_S = 60
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["llama_mp.llm", "jobs", "held", "shared_jobs"])


def alone(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """What `function` returns in a process of its own: torch is imported there, and nothing has run."""
    with SERVER.Pool(1) as pool:
        return pool.apply_async(function, arguments, named).get(JOB_TIMEOUT_S)


class Ranks:
    """`run(mp, function, **arguments)` calls `function(**arguments)` on ranks 0 .. mp - 1 of one world."""

    def __init__(self) -> None:
        self.workers: list[tuple[multiprocessing.Process, Connection]] = []

    def start(self) -> None:
        for _ in range(NUM_RANKS):
            ours, theirs = SERVER.Pipe()
            process = SERVER.Process(target=serve, args=(theirs,), daemon=True)
            process.start()
            self.workers.append((process, ours))

    def run(self, mp: int, function: Callable[..., Any], **arguments: Any) -> list[Any]:
        """Each rank's result. An exception on any rank ends the pool and fails the test with its traceback."""
        replies = self.replies(mp, function, **arguments)
        failed = [f"rank {rank}: {result}" for rank, (good, result) in enumerate(replies) if not good]
        if failed:
            self.stop()
            raise AssertionError("\n".join(failed))
        return [result for _, result in replies]

    def replies(self, mp: int, function: Callable[..., Any], **arguments: Any) -> list[tuple[bool, Any]]:
        """Each rank's result, after True; or why there is none. Who lets a rank fail must `stop` the pool."""
        if not self.workers:
            self.start()
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun's agent has one
        chosen = [connection for _, connection in self.workers[:mp]]
        for rank, connection in enumerate(chosen):
            connection.send((environment(rank, mp, store.port), function, arguments))
        deadline = time.monotonic() + JOB_TIMEOUT_S
        return [reply_of(connection, deadline) for connection in chosen]

    def stop(self) -> None:
        for process, _ in self.workers:
            process.kill()
            process.join()
        self.workers = []


def reply_of(connection: Connection, deadline: float) -> tuple[bool, Any]:
    if not connection.poll(max(0, deadline - time.monotonic())):
        return False, "no answer in time"
    try:
        return connection.recv()
    except EOFError:
        return False, "its process has ended"


def environment(rank: int, mp: int, port: int) -> dict[str, str]:
    """What torchrun would have set."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(mp),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(mp),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def serve(connection: Connection) -> None:
    """One rank's loop."""
    while True:
        variables, function, arguments = connection.recv()
        os.environ |= variables
        try:
            reply = (True, function(**arguments))
        except BaseException:
            reply = (False, traceback.format_exc())
        connection.send(reply)
