"""Before any rank starts: every node of a job's step answers in time, and has one rank for each of its GPUs.

The first node listens at MASTER_ADDR:MASTER_PORT, which the supervisor took from SLURM; the others say who they are,
and are told the port at which torchrun's store will listen. A node that cannot be reached is found out in a minute, by
its name, and not by a collective that waits for it.
"""

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass

from llama_mp.errors import NODES, RequestError, RunError, counted

ANSWER_S = 60.0
PATIENCE_S = 70.0  # of the nodes that call: the first one, which knows all that is missing, is to speak before them
RETRY_S = 0.2
LONGEST_LINE = 4096
LONGEST_CALL_S = 5.0  # for which one caller may keep the others waiting
ADVICE = "check that the nodes reach each other: firewall, the interface of the site file, DNS"


@dataclass(frozen=True, kw_only=True)
class Step:
    """This node's place among the nodes of a step that the supervisor started."""

    attempt: str  # "12-0": the job, and how often it was requeued
    nodes: tuple[str, ...]
    index: int
    num_gpus: int | None  # allocated to the job on this node; None: none were asked for
    address: str
    port: int

    @classmethod
    def of_environment(cls) -> "Step | None":
        """None outside of such a step."""
        nodes = os.environ.get(NODES)
        if not nodes:
            return None
        gpus = os.environ.get("SLURM_GPUS_ON_NODE")
        return cls(
            attempt=os.environ["LLAMA_MP_ATTEMPT"],
            nodes=tuple(nodes.split(",")),
            index=int(os.environ["SLURM_NODEID"]),
            num_gpus=int(gpus) if gpus else None,
            address=os.environ["MASTER_ADDR"],
            port=int(os.environ["MASTER_PORT"]),
        )

    @property
    def name(self) -> str:
        return self.nodes[self.index]

    def share_of(self, ranks: int) -> int:
        """How many of the job's `ranks` are this node's. Raises RequestError unless each has a GPU and no GPU idles."""
        share, left = divmod(ranks, len(self.nodes))
        if left or not share:
            raise RequestError(f"--mp {ranks} does not divide over {counted(len(self.nodes), 'node')}: change one")
        if self.num_gpus is not None and self.num_gpus != share:
            raise RequestError(
                f"node {self.name} has {counted(self.num_gpus, 'GPU')} for {counted(share, 'rank')}: give --mp "
                f"{self.num_gpus * len(self.nodes)}, or ask for {share} a node (--gpus_per_node)"
            )
        return share


def call_roll(step: Step, ranks: int, answer_s: float = ANSWER_S, patience_s: float = PATIENCE_S) -> int:
    """The port on the first node that is free for torchrun's store: the same on every node, once all have answered.

    Raises RunError when they do not, or RequestError when they were not started for the same `ranks`."""
    return listen(step, ranks, answer_s) if step.index == 0 else answer(step, ranks, patience_s)


def listen(step: Step, ranks: int, answer_s: float) -> int:
    """The first node: wait for the others, and tell each of them the port."""
    with contextlib.ExitStack() as opened:
        try:
            server = opened.enter_context(socket.create_server(("", step.port)))
        except OSError as error:
            raise RunError(
                f"port {step.port} of node {step.name} cannot be had ({error.strerror}): submit again"
            ) from error
        callers: dict[int, socket.socket] = {}
        arriving = calls(server, step, time.monotonic() + answer_s)
        while len(callers) < len(step.nodes) - 1 and (call := next(arriving, None)):
            index, told, connection = call
            callers[index] = opened.enter_context(connection)
            if told != ranks:
                raise RequestError(f"node {step.nodes[index]} was started for {told} ranks, {step.name} for {ranks}")
        missing = [name for i, name in enumerate(step.nodes) if i and i not in callers]
        if missing:
            raise RunError(
                f"{counted(len(missing), 'node')} did not reach {step.name} at {step.address}:{step.port} in "
                f"{answer_s:.0f} s ({', '.join(missing)}): {ADVICE}"
            )
        port = free_port()
        for connection in callers.values():
            connection.sendall(f"{port}\n".encode())
    return port


def calls(server: socket.socket, step: Step, deadline: float) -> Iterator[tuple[int, int, socket.socket]]:
    """(index, ranks, connection) of each node that calls before `deadline`; whoever else calls is not listened to."""
    while (left := deadline - time.monotonic()) > 0:
        server.settimeout(left)
        try:
            connection, _ = server.accept()
        except TimeoutError:
            return
        try:
            connection.settimeout(min(left, LONGEST_CALL_S))
            attempt, index, ranks = json.loads(line_from(connection))
            is_ours = attempt == step.attempt and index in range(1, len(step.nodes))
        except (OSError, ValueError, TypeError):
            is_ours = False
        if is_ours:
            yield index, ranks, connection
        else:
            connection.close()


def answer(step: Step, ranks: int, patience_s: float) -> int:
    """Another node: call the first one until it answers."""
    deadline, failure = time.monotonic() + patience_s, "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((step.address, step.port), timeout=left) as connection:
                connection.sendall(f"{json.dumps([step.attempt, step.index, ranks])}\n".encode())
                return int(line_from(connection))
        except (OSError, ValueError) as error:  # an empty answer: it gave up, and says why
            failure = str(error) or failure
        time.sleep(RETRY_S)
    raise RunError(f"node {step.name} cannot reach {step.nodes[0]} at {step.address}:{step.port} ({failure}): {ADVICE}")


def line_from(connection: socket.socket) -> bytes:
    with connection.makefile("rb") as file:
        return file.readline(LONGEST_LINE)


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]
