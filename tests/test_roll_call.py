"""Nodes of a job find each other, by threads that stand in for them; a real cluster is in test_slurm_jobs.py."""

import socket
import time
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from llama_mp.errors import RequestError, RunError
from llama_mp.slurm.roll_call import Step, call_roll, free_port, listen

NODES = ("n1", "n2", "n3")


def step(index: int, port: int, **other: object) -> Step:
    fields = {"attempt": "12-0", "nodes": NODES, "index": index, "num_gpus": 2, "address": "127.0.0.1", "port": port}
    return Step(**fields | other)


def call(pool: ThreadPoolExecutor, *steps: Step, ranks: int = 6, answer_s: float = 10) -> list[Future]:
    return [pool.submit(call_roll, one, ranks, answer_s, answer_s + 1) for one in steps]


def connected(port: int) -> socket.socket:
    """A connection to who is about to listen."""
    for _ in range(100):
        try:
            return socket.create_connection(("127.0.0.1", port))
        except ConnectionRefusedError:
            time.sleep(0.05)
    raise AssertionError(f"nobody listens at {port}")


def result_of(future: Future) -> object:
    error = future.exception(30)
    return error or future.result()


def test_every_node_learns_the_same_port():
    port = free_port()
    with ThreadPoolExecutor(3) as pool:
        others = call(pool, step(2, port), step(1, port))
        time.sleep(0.3)  # nodes of a job do not start at the same moment
        (first,) = call(pool, step(0, port))
        found = {result_of(future) for future in (first, *others)}
    (told,) = found
    with socket.create_server(("", told)):
        pass


def test_nodes_that_do_not_come_are_named():
    port = free_port()
    with ThreadPoolExecutor(2) as pool:
        first, second = map(result_of, call(pool, step(0, port), step(1, port), answer_s=1))
    assert isinstance(first, RunError) and isinstance(second, RunError)
    assert str(first).startswith(f"1 node did not reach n1 at 127.0.0.1:{port} in 1 s (n3): check")
    assert str(second).startswith(f"node n2 cannot reach n1 at 127.0.0.1:{port}")


def test_nodes_of_another_job_and_strangers_are_not_counted():
    port = free_port()
    with ThreadPoolExecutor(4) as pool:
        (first,) = call(pool, step(0, port), answer_s=2)
        for noise in (b"GET / HTTP/1.1\r\n", b'["12-0", 7, 6]\n', b'["12-0", "1", 6]\n', b"\xff\n", b""):
            with connected(port) as stranger:
                stranger.sendall(noise)
        others = call(pool, step(1, port, attempt="13-0"), step(2, port), answer_s=2)
        assert "(n2)" in str(result_of(first))
        assert all(isinstance(result_of(future), RunError) for future in others)


def test_a_port_that_is_taken_is_named():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(RunError, match=f"port {port} of node n1 cannot be had"):
            listen(step(0, port), 6, 1)


def test_nodes_started_for_other_numbers_of_ranks_are_refused():
    port = free_port()
    with ThreadPoolExecutor(2) as pool:
        (first,) = call(pool, step(0, port, nodes=NODES[:2]), ranks=4)
        call(pool, step(1, port, nodes=NODES[:2]), ranks=6, answer_s=1)
        assert str(result_of(first)) == "node n2 was started for 6 ranks, n1 for 4"


@pytest.mark.parametrize(
    ("ranks", "num_gpus", "said"),
    [
        (4, 2, "--mp 4 does not divide over 3 nodes"),
        (1, 2, "--mp 1 does not divide over 3 nodes"),
        (3, 2, "node n2 has 2 GPUs for 1 rank: give --mp 6, or ask for 1 a node"),
        (9, 1, "node n2 has 1 GPU for 3 ranks: give --mp 3, or ask for 3 a node"),
    ],
)
def test_each_rank_has_a_gpu_and_each_gpu_a_rank(ranks, num_gpus, said):
    with pytest.raises(RequestError, match=said):
        step(1, 0, num_gpus=num_gpus).share_of(ranks)


def test_nodes_share_the_ranks():
    assert step(1, 0).share_of(6) == 2
    assert step(1, 0, num_gpus=None).share_of(9) == 3


def test_a_step_is_what_the_environment_says(monkeypatch):
    assert Step.of_environment() is None
    told = {
        "LLAMA_MP_NODES": "n1,n2,n3",
        "LLAMA_MP_ATTEMPT": "12-0",
        "SLURM_NODEID": "1",
        "SLURM_GPUS_ON_NODE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "10012",
    }
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    assert Step.of_environment() == step(1, 10012)
    assert Step.of_environment().name == "n2"
