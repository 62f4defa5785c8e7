"""The flags of `launch/submit.py`: those of each verb, and those of the cluster that it is to run on."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llama_mp.batch import InferFlags
from llama_mp.bench import BenchFlags
from llama_mp.config import MAX_GIB
from llama_mp.errors import RequestError
from llama_mp.flags import REQUIRED, Flags, check_at_least, flag
from llama_mp.reshard_request import ReshardFlags
from llama_mp.slurm.site import SITE_FILE


def seconds_of(time: str) -> int:
    """A time limit as sbatch takes it: minutes, or [D-]HH:MM:SS. Raises RequestError for anything else."""
    if re.fullmatch("[0-9]{1,6}", time):
        seconds = int(time) * 60
    elif found := re.fullmatch(r"(?:([0-9]{1,3})-)?([0-9]{1,4}):([0-5][0-9]):([0-5][0-9])", time):
        days, hours, minutes, rest = (int(part or 0) for part in found.groups())
        seconds = ((days * 24 + hours) * 60 + minutes) * 60 + rest
    else:
        raise RequestError(f"--time is {time!r}, but must be minutes, or [D-]HH:MM:SS, such as 90 or 1-12:00:00")
    if seconds < 60:
        raise RequestError(f"--time is {time}, but must be at least a minute")
    return seconds


@dataclass(frozen=True, kw_only=True)
class ClusterConfig(Flags):
    """What every job is asked with."""

    cluster: Path | None = flag(None, f"the site file, in TOML; default: {SITE_FILE}, if it is there")
    partition: str | None = flag(None, "default: the site file's, or SLURM's own")
    account: str | None = flag(None, "default: the site file's, or your own")
    time: str | None = flag(None, "minutes, or [D-]HH:MM:SS; default: twice what the work is thought to take")
    cpus_per_node: int | None = flag(None, "default: up to 8 for each rank")
    mem_gib: float | None = flag(None, "main memory of each node, in GiB (2**30 bytes); default: as planned")
    job_name: str | None = flag(None, "default: the verb and the model")
    log_dir: Path = flag(Path("."), "the folder of the log, JOB_NAME-ID.out; it must be there")
    python: str | None = flag(None, "the interpreter on the nodes; default: the site file's, or the one that runs this")
    after: str | None = flag(None, "start once this job has ended well; if it fails, this one is cancelled")
    max_restarts: int = flag(3, "how often a crashed run is started again, if it had finished more prompts")
    wait: bool = flag(False, "wait for the job's end, and end with the verb's exit code")
    dry_run: bool = flag(False, "print the batch script, and submit nothing")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, cpus_per_node=1, mem_gib=0.1, max_restarts=0)
        if self.mem_gib is not None and self.mem_gib > MAX_GIB:
            raise RequestError(f"--mem_gib is {self.mem_gib:g}, but must be at most {MAX_GIB}")
        if self.after is not None and not re.fullmatch(r"[0-9]+(_[0-9]+)?", self.after):
            raise RequestError(f"--after is {self.after!r}, but must be a job's id, such as 12, or 12_3 of an array")
        if self.time is not None:
            seconds_of(self.time)
        if not self.log_dir.is_dir():
            raise RequestError(f"--log_dir {self.log_dir}: there is no such folder, and SLURM makes none; make it")
        if self.wait and self.dry_run:
            raise RequestError("--wait and --dry_run are both given: nothing is submitted; drop one")

    @property
    def time_s(self) -> int | None:
        return None if self.time is None else seconds_of(self.time)


@dataclass(frozen=True, kw_only=True)
class NodesConfig(ClusterConfig):
    """For the verbs that run a model."""

    nodes: int | None = flag(None, "default: as few as the ranks need")
    gpus_per_node: int | None = flag(None, "default: the ranks over the nodes; none with --device cpu")
    gpu: str | None = flag(None, 'the card to plan for, such as "A100 80GB"; default: the site file\'s')
    vram_gib: float | None = flag(None, "memory of any other card, in GiB (2**30 bytes)")
    device: Literal["cuda", "auto", "cpu"] = flag("cuda", "where the model runs; auto: on a CPU where no GPU is found")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, nodes=1, gpus_per_node=1, vram_gib=1)
        if self.gpu is not None and self.vram_gib is not None:
            raise RequestError("--gpu and --vram_gib are both given: drop one")
        if self.device == "cpu":
            for name in ("gpus_per_node", "gpu", "vram_gib"):
                if getattr(self, name) is not None:
                    raise RequestError(f"--{name} with --device cpu: the GPUs would be idle; drop one")


@dataclass(frozen=True, kw_only=True)
class ArrayConfig(NodesConfig):
    """For the verb whose work can be divided over jobs."""

    array: int | None = flag(None, "divide the prompts over this many jobs, whose answers come into one --output")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, array=1)


@dataclass(frozen=True, kw_only=True)
class InferJobFlags(ArrayConfig, InferFlags):
    """`submit.py infer`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.array is not None and self.output is None:
            raise RequestError("--array without --output: the answers of all jobs come into one file; give one")


@dataclass(frozen=True, kw_only=True)
class BenchJobFlags(NodesConfig, BenchFlags):
    """`submit.py bench`."""


@dataclass(frozen=True, kw_only=True)
class ReshardJobFlags(ClusterConfig, ReshardFlags):
    """`submit.py reshard`."""


ModelJobFlags = InferJobFlags | BenchJobFlags
JobFlags = ModelJobFlags | ReshardJobFlags
JOBS = {"infer": InferJobFlags, "bench": BenchJobFlags, "reshard": ReshardJobFlags}


@dataclass(frozen=True, kw_only=True)
class JobIdFlags(Flags):
    """`submit.py logs` and `cancel`."""

    id: str = flag(REQUIRED, "the job's id, as submit.py printed it; 12_3 for a task of an array", positional=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"[0-9]+(_[0-9]+)?", self.id):
            raise RequestError(f"ID is {self.id!r}, but must be a number, or 12_3 for a task of an array")


@dataclass(frozen=True, kw_only=True)
class StatusFlags(JobIdFlags):
    """`submit.py status`."""

    json: bool = flag(False, "print one JSON list, an object for each task, instead of lines")


REPORTS = {"status": StatusFlags, "logs": JobIdFlags, "cancel": JobIdFlags}


@dataclass(frozen=True, kw_only=True)
class VerbFlags(Flags):
    """What stands first on the command line of `submit.py`."""

    verb: Literal[(*JOBS, *REPORTS)] = flag(
        REQUIRED, "infer, bench or reshard, to be run; status, logs or cancel, of a job", positional=True
    )
