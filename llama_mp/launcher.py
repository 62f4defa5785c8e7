"""Start a verb on N ranks of this machine, or on this node's share of N: torchrun, in this process, with its noise left
out and its codes kept."""

import ctypes
import logging
import os
import signal
import sys
import threading

from llama_mp.deaths import num_oom_kills
from llama_mp.errors import BAD_REQUEST, INTERRUPTED, LAUNCHED, RUN_FAILED, RequestError, RunError, set_speaker
from llama_mp.slurm.roll_call import Step, call_roll

KILLED_BY = {
    "SIGKILL": ": the machine ran out of memory, or somebody ended it; see the kernel's log, or start fewer ranks",
    "SIGABRT": ": a library gave up, NCCL for one when another rank is gone or silent for longer than --step_timeout; "
    "launch/doctor.py finds out which do not reach each other",
}
PR_SET_PDEATHSIG = 1  # prctl(2)


def check_ranks(mp: int | None) -> int:
    """The number of ranks of this run: torchrun's, else --mp, else 1. Raises RequestError when the two differ, or when
    a job's nodes and GPUs are not as many."""
    world_size = os.environ.get("WORLD_SIZE")
    if mp is not None and mp < 1:
        raise RequestError(f"--mp is {mp}, but must be at least 1")
    if world_size is not None and mp is not None and int(world_size) != mp:
        raise RequestError(f"--mp {mp}, but torchrun started {world_size} ranks: drop --mp")
    step = Step.of_environment()
    if world_size is None and step:
        step.share_of(mp or 1)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()
    return int(world_size or mp or 1)


def must_launch(ranks: int) -> bool:
    """Whether this process is to start `ranks` ranks, rather than being one of them."""
    return ranks > 1 and "WORLD_SIZE" not in os.environ


def is_alone() -> bool:
    """Whether this process starts, or is, the whole run, and not one node's part of a job."""
    step = Step.of_environment()
    return step is None or len(step.nodes) == 1


def end_with_parent() -> None:
    """Have the kernel end this rank when torchrun ends, however that happens: no rank is left behind."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def leave_at_the_second_interrupt() -> None:
    """The first Ctrl-C lets torchrun end the ranks, for which it may wait half a minute. The second ends this process,
    and the kernel with it the ranks."""
    wake, waker = os.pipe()
    os.set_blocking(waker, False)
    signal.set_wakeup_fd(waker, warn_on_full_buffer=False)  # torchrun sets handlers of its own: this hears them all

    def listen() -> None:
        interrupts = 0
        while interrupts < 2:
            interrupts += os.read(wake, 1)[0] == signal.SIGINT
        os._exit(INTERRUPTED)

    threading.Thread(target=listen, daemon=True).start()


def rendezvous(ranks: int) -> list[str]:
    """torchrun's flags for this node's share of `ranks`: alone on a free port, or with the other nodes of a job."""
    if is_alone():
        return ["--standalone", f"--nproc_per_node={ranks}"]
    step = Step.of_environment()
    share, port = step.share_of(ranks), call_roll(step, ranks)
    place = [f"--nnodes={len(step.nodes)}", f"--node_rank={step.index}", f"--nproc_per_node={share}"]
    return [*place, f"--master_addr={step.address}", f"--master_port={port}"]


def launch(ranks: int) -> int:
    """Run this same command line under torchrun, on `ranks` ranks and a free port. Returns the exit code.

    A rank that ended with a code of ours has said why; for one that was killed, this raises RunError."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else ranks that leave after the store tell of it at length
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import get_args_parser, run

    logging.disable()  # all of it: torch's loggers have levels of their own, and this process does nothing else
    arguments = [argument.replace("$", "$$") for argument in sys.argv]  # torchrun reads them as string.Template
    no_logs = f"--log_dir={os.devnull}"  # else torchrun leaves a folder for them, empty, behind each run
    command = [*rendezvous(ranks), no_logs, *arguments]
    oom_kills = num_oom_kills()
    said = os.memfd_create("llama-mp-said")  # gone with this process, whatever ends it
    os.environ[LAUNCHED] = f"/proc/{os.getpid()}/fd/{said}"
    leave_at_the_second_interrupt()
    try:
        run(get_args_parser().parse_args(command))
    except ChildFailedError as error:
        return code_of(error, is_said=os.fstat(said).st_size > 0, oom_kills=oom_kills)
    except SignalException as error:
        return INTERRUPTED if error.sigval == signal.SIGINT else 128 + error.sigval
    return 0


def code_of(error: "ChildFailedError", *, is_said: bool, oom_kills: int) -> int:  # noqa: F821  torch is in `launch`
    """The exit code of the rank that failed first. Raises RunError when a signal killed it, unless another rank has
    said why: it ends ranks that do not answer. `oom_kills`: the kernel's count before the ranks began."""
    rank, failure = error.get_first_failure()
    if failure.exitcode < 0 and not is_said:
        name, step = signal.Signals(-failure.exitcode).name, Step.of_environment()
        place = f"rank {rank} on {step.name}" if step else f"rank {rank}"
        set_speaker(lambda: True)  # of all nodes only this one knows
        why = KILLED_BY.get(name, "; see the output above, if any")
        if name == "SIGKILL" and num_oom_kills() > oom_kills:
            why = ": the kernel ended it, out of memory; start more ranks, or lower --max_batch_size, --max_seq_len"
        raise RunError(f"{place} was killed by {name}{why}")
    return failure.exitcode if failure.exitcode in (BAD_REQUEST, INTERRUPTED) else RUN_FAILED
