"""What the ranks of the pool run to be examined, one of them with something wrong."""

import json
import os
import signal
import time
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import torch.distributed as dist

from llama_mp import network
from llama_mp.examine import diagnose
from llama_mp.ward import close, enter


def healthy() -> dict[str, Any]:
    found = diagnose(enter(30.0), "cpu")
    close()
    return json.loads(json.dumps(found.as_json))


def wrong(rank: int, what: str, step_timeout: float) -> dict[str, Any]:
    """The findings of each rank that has any; this process is of no use for anything else afterwards."""
    ward = enter(step_timeout)
    with faulty(what) if ward.world.rank == rank else nullcontext():
        found = diagnose(ward, "cpu")
    ward.world.store.set(f"diagnosed/{ward.world.rank}", "")
    for other in set(range(ward.world.size)) - set(found.silent):
        ward.wait_for(f"diagnosed/{other}", 5.0)  # it looks at the silent one too
    ward.end_silent(list(found.silent))
    return json.loads(json.dumps(found.as_json))


def faulty(what: str) -> Any:
    exchange, send, all_reduce = network.exchange, dist.send, dist.all_reduce

    def stopping(*arguments: Any) -> float:
        os.kill(os.getpid(), getattr(signal, what))
        return exchange(*arguments)

    def hanging_with_rank_2(device: Any, group: Any, own: int, other: int, *arguments: Any) -> float:
        if other == 2:
            time.sleep(600)
        return exchange(device, group, own, other, *arguments)

    def changing(tensor: Any, *arguments: Any) -> None:
        send(tensor + 1, *arguments)

    def adding(tensor: Any, **named: Any) -> None:
        all_reduce(tensor, **named)
        tensor += 1

    return {
        "SIGSTOP": lambda: patch.object(network, "exchange", stopping),
        "SIGKILL": lambda: patch.object(network, "exchange", stopping),
        "hang": lambda: patch.object(network, "exchange", hanging_with_rank_2),
        "changed": lambda: patch.object(dist, "send", changing),
        "wrong sum": lambda: patch.object(dist, "all_reduce", adding),
        "cut off": lambda: patch.object(network, "unreached", lambda places, timeout_s: {0: "Connection refused"}),
        "no gloo": lambda: patch.object(dist, "init_process_group", lambda *_, **__: 1 / 0),
    }[what]()
