"""Plan the memory of a model: what each rank holds, whether that fits a card, and what does if it does not.

Without a size it prints a table of all. No weight is read, and no GPU is needed.

Examples:
    python launch/plan.py
    python launch/plan.py --size 65B --mp 8 --gpu "A100 40GB"
    python launch/plan.py --size 7B --gpu "RTX 2080" --batch_size 2 --seq_len 1024
    python launch/plan.py --guide
"""

import json
import sys
from pathlib import Path

from llama_mp import cli
from llama_mp.config import load_size
from llama_mp.guide import write_guide
from llama_mp.plan import Plan, PlanFlags, plan_all, plan_one, too_long
from llama_mp.plan_text import page, table


def main(flags: PlanFlags) -> None:
    if flags.guide:
        print(*write_guide(Path("docs")), sep="\n")
        return
    coloured = sys.stdout is not None and sys.stdout.isatty()
    if flags.size or flags.ckpt_dir:
        plan = asked(flags)
        print(json.dumps(plan.as_json()) if flags.json else page(plan, coloured=coloured))
        return
    plans = list(plan_all(flags))
    if left_out := too_long(flags):
        print(f"left out, their context is shorter than {flags.seq_len}: {', '.join(left_out)}", file=sys.stderr)
    print(json.dumps([plan.as_json() for plan in plans]) if flags.json else table(plans, coloured=coloured))


def asked(flags: PlanFlags) -> Plan:
    """The plan of the one model that the flags name."""
    if flags.size:
        return plan_one(flags, load_size(flags.size))
    from llama_mp.headers import whole_config  # slow to import, and needed for a checkpoint alone
    from llama_mp.locate import checkpoint_at

    checkpoint = checkpoint_at(flags.ckpt_dir)
    return plan_one(flags, whole_config(checkpoint), checkpoint.files)


if __name__ == "__main__":
    cli.main(PlanFlags, main, summary=__doc__)
