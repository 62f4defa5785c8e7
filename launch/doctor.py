"""Find out why a launch fails, hangs or crawls: devices, torch and its driver, memory, ports, each pair of ranks, sums
over all of them, and what earlier runs have left.

Exit code 0: healthy; 1: faults were found, each told with what to do about it. No model is needed.

Examples:
    torchrun --nproc_per_node 8 launch/doctor.py
    python launch/doctor.py --mp 2
    python launch/doctor.py --json
"""

import json
import sys

from llama_mp import cli
from llama_mp.doctor import DoctorFlags, Findings
from llama_mp.doctor_text import page
from llama_mp.launcher import check_ranks, launch, must_launch


def main(flags: DoctorFlags) -> int:
    ranks = check_ranks(flags.mp)
    if must_launch(ranks):
        return launch(ranks)
    from llama_mp.examine import examine

    def show(found: Findings) -> None:
        coloured = sys.stdout is not None and sys.stdout.isatty()
        print(json.dumps(found.as_json) if flags.json else page(found, coloured=coloured), flush=True)

    return examine(flags, show)


if __name__ == "__main__":
    cli.main(DoctorFlags, main, summary=__doc__)
