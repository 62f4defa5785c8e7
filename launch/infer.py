"""Answer prompts with a LLaMA model, over any number of ranks.

Examples:
    torchrun --nproc_per_node 8 launch/infer.py --size 65B
    python launch/infer.py --mp 2 --chat --prompt "What is the capital of France?"
    python launch/infer.py --prompts_file prompts.jsonl --output answers.jsonl
"""

import os

from llama_mp import cli
from llama_mp.batch import Batch, InferFlags
from llama_mp.launcher import check_ranks, is_alone, launch, must_launch
from llama_mp.locate import Checkpoint, locate
from llama_mp.memory import check_layout


def main(flags: InferFlags) -> int:
    ranks = check_ranks(flags.mp)
    checkpoint = locate(flags)
    check_layout(checkpoint.config, ranks, flags.quant, flags.deterministic)
    if must_launch(ranks):
        if is_alone() and not flags.reads_standard_input:
            with Batch.open(flags, checkpoint) as batch:  # refuse, or find nothing to do, before any rank starts
                if not batch.has_work:
                    return show_finished(batch)
        return launch(ranks)
    if os.environ.get("RANK", "0") != "0":
        return run(flags, checkpoint, None)
    with Batch.open(flags, checkpoint) as batch:
        if ranks == 1 and not batch.has_work:  # several ranks learn it together, in `run`
            return show_finished(batch)
        return run(flags, checkpoint, batch)


def run(flags: InferFlags, checkpoint: Checkpoint, batch: Batch | None) -> int:
    """One rank's part; rank 0 has the batch."""
    from llama_mp.llm import LLM
    from llama_mp.measure import end_run
    from llama_mp.parallel import connect

    world = connect(flags)
    if not world.tell(batch and batch.has_work):
        world.close()
        return show_finished(batch) if batch else 0
    codec, answers = (batch.codec, batch.answers) if batch else (None, ())
    with LLM.of_checkpoint(flags, checkpoint, world, codec=codec, answers=answers) as llm:
        if batch is None:
            llm.follow()
        else:
            batch.show(llm.stream(batch.answers))
        end_run(llm, flags)
    return 0


def show_finished(batch: Batch) -> int:
    """Nothing is left to compute: what is known already needs no model."""
    batch.show(iter(()))
    return 0


if __name__ == "__main__":
    cli.main(InferFlags, main, summary=__doc__)
