"""A job, from the flags of `launch/submit.py`: planned, and refused where its verb would refuse it."""

import re
import sys
from dataclasses import fields, replace
from pathlib import Path

from llama_mp.batch import InferFlags
from llama_mp.bench import BenchFlags
from llama_mp.errors import RequestError, counted
from llama_mp.flags import Flags, words_of
from llama_mp.reshard_request import ReshardFlags
from llama_mp.slurm.flags import BenchJobFlags, InferJobFlags, JobFlags, NodesConfig, ReshardJobFlags
from llama_mp.slurm.resources import Demand, Resources, reshard_resources
from llama_mp.slurm.script import Job
from llama_mp.slurm.site import Site, read_site
from llama_mp.slurm.work import bench_work, infer_work, reshard_bytes

VERB_FLAGS = {InferJobFlags: InferFlags, BenchJobFlags: BenchFlags, ReshardJobFlags: ReshardFlags}


def job_of(verb: str, flags: JobFlags, program: str) -> tuple[Job, list[str]]:
    """The job that `program`, the path of submit.py as it was called, is asked for, and what is to be said of it.

    Raises RequestError for all that `verb` would refuse before it starts, and for what cannot run as a job."""
    check_log_dir(flags.log_dir)
    site = read_site(flags.cluster)
    notes: list[str] = []
    model, resources = planned(flags, site, notes)
    python = str(Path(flags.python or site.python or sys.executable).expanduser())
    is_infer = isinstance(flags, InferJobFlags)
    job = Job(
        source=(program, verb, *words_of(replace(flags, dry_run=False))),
        name=flags.job_name or "-".join([verb, *filter(None, [plain(model)])]),
        nodes=resources.nodes,
        gpus_per_node=resources.gpus_per_node,
        cpus_per_node=resources.cpus_per_node,
        mem_mib=resources.mem_mib,
        time_s=resources.time_s,
        log_dir=flags.log_dir,
        python=python,
        verb=(str(Path(program).with_name(f"{verb}.py")), *words_of(own_flags(flags, resources))),
        output=flags.output if is_infer else None,
        max_restarts=flags.max_restarts,
        array=flags.array if is_infer else None,
        after=flags.after,
        partition=flags.partition or site.partition,
        account=flags.account or site.account,
        gpu_flag=site.gpu_flag,
        options=site.options,
        interface=site.interface,
        setup=site.setup,
    )
    return job, notes


def planned(flags: JobFlags, site: Site, notes: list[str]) -> tuple[str, Resources]:
    """The name of the model, empty where it is not known yet, and what the job needs."""
    if isinstance(flags, ReshardJobFlags):
        may_be_absent = flags.dry_run or flags.after is not None
        model, num_bytes = reshard_bytes(own_flags(flags), may_be_absent=may_be_absent) or ("", None)
        return model, reshard_resources(flags, site, num_bytes)
    work = infer_work(flags, notes) if isinstance(flags, InferJobFlags) else bench_work(flags, notes)
    demand = Demand(flags=flags, site=site, work=work)
    resources = demand.resources()
    if demand.card is None and not demand.on_cpu:
        gpus = counted(resources.nodes * resources.gpus_per_node, "GPU")
        notes.append(
            f"{gpus}: no card is named, by --gpu, --vram_gib or the site file, so nothing says whether that fits"
        )
    return work.config.name if work else "", resources


def own_flags(flags: JobFlags, resources: Resources | None = None) -> Flags:
    """The verb's flags of a job's: without the cluster's, and with the ranks that were planned."""
    verb_flags = VERB_FLAGS[type(flags)]
    values = {f.name: getattr(flags, f.name) for f in fields(verb_flags)}
    if isinstance(flags, NodesConfig) and resources is not None:
        values["mp"] = resources.nodes * resources.ranks_per_node
    if isinstance(flags, ReshardJobFlags):
        values["dry_run"] = False  # submit.py's own
    return verb_flags(**values)


def plain(name: str) -> str:
    """A model's name, which may be any text in its files, as a part of a job's."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-")


def check_log_dir(log_dir: Path) -> None:
    """Raise RequestError where the log would be lost: SLURM writes none to a path with a backslash, replaces %j and its
    like in the folder of submission too, and forgets in `scontrol show job` that %% stands for %."""
    for character in "%\\":
        if character in str(log_dir.absolute()):
            raise RequestError(
                f"--log_dir {log_dir.absolute()}: SLURM loses a log that has {character} in its folder's name; "
                "give another folder, with its whole path"
            )
