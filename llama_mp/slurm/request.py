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
from llama_mp.slurm.resources import Request, Resources, reshard_resources
from llama_mp.slurm.script import Job
from llama_mp.slurm.site import Site, read_site
from llama_mp.slurm.work import bench_work, infer_work, reshard_bytes

VERB_FLAGS = {InferJobFlags: InferFlags, BenchJobFlags: BenchFlags, ReshardJobFlags: ReshardFlags}


def job_of(verb: str, flags: JobFlags, program: str) -> Job:
    """The job that `program`, the path of submit.py as it was called, is asked for. Notes go to stderr.

    Raises RequestError for all that `verb` would refuse before it starts, and for what cannot run as a job."""
    check_log_dir(flags.log_dir)
    site = read_site(flags.cluster)
    model, resources = planned(flags, site)
    python = str(Path(flags.python or site.python or sys.executable).expanduser())
    own = own_flags(flags, resources)
    return Job(
        source=(program, verb, *words_of(replace(flags, dry_run=False))),
        name=flags.job_name or "-".join([verb, *filter(None, [plain(model)])]),
        nodes=resources.nodes,
        gpus_per_node=resources.gpus_per_node,
        cpus_per_node=resources.cpus_per_node,
        mem_mib=resources.mem_mib,
        time_s=resources.time_s,
        log_dir=flags.log_dir,
        python=python,
        verb=(str(Path(program).with_name(f"{verb}.py")), *words_of(own)),
        output=flags.output if isinstance(flags, InferJobFlags) else None,
        max_restarts=flags.max_restarts,
        array=getattr(flags, "array", None),
        after=flags.after,
        partition=flags.partition or site.partition,
        account=flags.account or site.account,
        gpu_flag=site.gpu_flag,
        options=site.options,
        interface=site.interface,
        setup=site.setup,
    )


def planned(flags: JobFlags, site: Site) -> tuple[str, Resources]:
    """The name of the model, empty where it is not known yet, and what the job needs."""
    if isinstance(flags, ReshardJobFlags):
        may_be_absent = flags.dry_run or flags.after is not None
        model, num_bytes = reshard_bytes(own_flags(flags), may_be_absent=may_be_absent) or ("", None)
        return model, reshard_resources(flags, site, num_bytes)
    work = infer_work(flags) if isinstance(flags, InferJobFlags) else bench_work(flags)
    request = Request(flags=flags, site=site, work=work)
    resources = request.resources()
    if request.card is None and not request.on_cpu:
        gpus = counted(resources.nodes * resources.gpus_per_node, "GPU")
        print(
            f"{gpus}: no card is named, by --gpu, --vram_gib or the site file, so nothing says whether that fits",
            file=sys.stderr,
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
    """Raise RequestError where SLURM would look for the log elsewhere: it takes a relative path for one of the folder
    of submission, and replaces %j and its like in that folder's name too."""
    if not log_dir.is_absolute() and "%" in str(Path.cwd()):
        raise RequestError(f"SLURM replaces what follows a % in {Path.cwd()}: give --log_dir with its whole path")
    if "\\" in str(log_dir.absolute()):
        raise RequestError(f"--log_dir {log_dir.absolute()}: SLURM writes no log where a name has a \\; give another")
