"""Start a verb on N ranks of this machine: torchrun, in this process, with its noise left out and its codes kept."""

import logging
import os
import signal
import sys

from llama_mp.errors import BAD_REQUEST, INTERRUPTED, LAUNCHED, RUN_FAILED, RequestError, RunError

KILLED_BY = {
    "SIGKILL": ": the machine ran out of memory, or somebody ended it; see the kernel's log, or start fewer ranks",
    "SIGABRT": ": a library gave up, NCCL for one when another rank is gone or silent for longer than --step_timeout",
}


def check_ranks(mp: int | None) -> int:
    """The number of ranks of this run: torchrun's, else --mp, else 1. Raises RequestError when the two differ."""
    world_size = os.environ.get("WORLD_SIZE")
    if mp is not None and mp < 1:
        raise RequestError(f"--mp is {mp}, but must be at least 1")
    if world_size is not None and mp is not None and int(world_size) != mp:
        raise RequestError(f"--mp {mp}, but torchrun started {world_size} ranks: drop --mp")
    return int(world_size or mp or 1)


def must_launch(ranks: int) -> bool:
    """Whether this process is to start `ranks` ranks, rather than being one of them."""
    return ranks > 1 and "WORLD_SIZE" not in os.environ


def launch(ranks: int) -> int:
    """Run this same command line under torchrun, on `ranks` ranks and a free port. Returns the exit code.

    A rank that ended with a code of ours has said why; for one that was killed, this raises RunError."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import get_args_parser, run

    os.environ[LAUNCHED] = "1"
    logging.disable()  # all of it: torch's loggers have levels of their own, and this process does nothing else
    arguments = [argument.replace("$", "$$") for argument in sys.argv]  # torchrun reads them as string.Template
    command = ["--standalone", f"--nproc_per_node={ranks}", *arguments]
    try:
        run(get_args_parser().parse_args(command))
    except ChildFailedError as error:
        return code_of(error)
    except SignalException as error:
        return INTERRUPTED if error.sigval == signal.SIGINT else 128 + error.sigval
    return 0


def code_of(error: "ChildFailedError") -> int:  # noqa: F821  torch is imported in `launch` alone
    """The exit code of the rank that failed first. Raises RunError when a signal killed it: it could not say so."""
    rank, failure = error.get_first_failure()
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        raise RunError(f"rank {rank} was killed by {name}{KILLED_BY.get(name, '; see the output above, if any')}")
    return failure.exitcode if failure.exitcode in (BAD_REQUEST, INTERRUPTED) else RUN_FAILED
