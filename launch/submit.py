"""Submit a verb as a job of SLURM, with what it needs taken from the plan; see what became of it.

`submit.py VERB --help` lists the flags of a verb: its own, and the cluster's.

Examples:
    python launch/submit.py infer --size 65B --gpu "A100 80GB" --prompts_file prompts.jsonl --output answers.jsonl
    python launch/submit.py reshard --input ~/llama-mp/65B --output ~/llama-mp/65B-mp2 --mp 2 --dry_run
    python launch/submit.py status 12
"""

import sys
from dataclasses import asdict
from functools import partial

from llama_mp import cli
from llama_mp.errors import RequestError
from llama_mp.slurm import cluster, report
from llama_mp.slurm.flags import JOBS, REPORTS, JobFlags, JobIdFlags, VerbFlags
from llama_mp.slurm.request import job_of
from llama_mp.slurm.script import render


def submit(verb: str, flags: JobFlags) -> None:
    job, notes = job_of(verb, flags, sys.argv[0])
    text = render(job)
    if flags.dry_run:
        print(text, end="")
    else:
        id = cluster.submit(text)
        print(id, flush=True)
    for note in notes:
        print(note, file=sys.stderr)
    if flags.wait:
        report.wait(id)


def tell(verb: str, flags: JobIdFlags) -> None:
    getattr(report, verb)(**asdict(flags))


def refuse(flags: VerbFlags) -> None:
    raise RequestError(f"write the verb first: python {sys.argv[0]} {flags.verb} --name value ...")


def main() -> None:
    verb = sys.argv[1] if len(sys.argv) > 1 else ""
    for verbs, run in ((JOBS, submit), (REPORTS, tell)):
        if verb in verbs:
            program = f"{sys.argv[0]} {verb}"
            cli.main(verbs[verb], partial(run, verb), argv=sys.argv[2:], program=program, summary=__doc__)
    cli.main(VerbFlags, refuse, argv=sys.argv[1:2], summary=__doc__)


if __name__ == "__main__":
    main()
