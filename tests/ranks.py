"""A pool of ranks: processes forked once from a server that has imported torch and run none of it.

torchrun takes 20 s to start 8 ranks on 2 cores; these are there in a fraction of a second, and run job after job.
"""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

NUM_RANKS = 8
JOB_TIMEOUT_S = 120


class Ranks:
    """`run(mp, function, **arguments)` calls `function(**arguments)` on ranks 0 .. mp - 1 of one world."""

    def __init__(self) -> None:
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["llama_mp.llm", "jobs"])
        self.workers: list[tuple[multiprocessing.Process, Connection]] = []

    def start(self) -> None:
        for _ in range(NUM_RANKS):
            ours, theirs = self.context.Pipe()
            process = self.context.Process(target=serve, args=(theirs,), daemon=True)
            process.start()
            self.workers.append((process, ours))

    def run(self, mp: int, function: Callable[..., Any], **arguments: Any) -> list[Any]:
        """Each rank's result. An exception on any rank ends the pool and fails the test with its traceback."""
        if not self.workers:
            self.start()
        port = free_port()
        chosen = [connection for _, connection in self.workers[:mp]]
        for rank, connection in enumerate(chosen):
            connection.send((rank, mp, port, function, arguments))
        replies = [c.recv() if c.poll(JOB_TIMEOUT_S) else (False, "no answer in time") for c in chosen]
        failed = [f"rank {rank}: {result}" for rank, (good, result) in enumerate(replies) if not good]
        if failed:
            self.stop()
            raise AssertionError("\n".join(failed))
        return [result for _, result in replies]

    def stop(self) -> None:
        for process, _ in self.workers:
            process.kill()
            process.join()
        self.workers = []


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def serve(connection: Connection) -> None:
    """One rank's loop: what torchrun would have put into the environment, then the job."""
    while True:
        rank, mp, port, function, arguments = connection.recv()
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(mp), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(mp)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        try:
            reply = (True, function(**arguments))
        except BaseException:
            reply = (False, traceback.format_exc())
        connection.send(reply)
