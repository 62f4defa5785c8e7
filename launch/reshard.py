"""Write a checkpoint anew: another number of shards, Meta's or Hugging Face's format, another type of weights.

Examples:
    python launch/reshard.py --input ~/llama/65B --output ~/llama/65B-mp2 --mp 2
    python launch/reshard.py --input model.gguf --output model-hf --format hf --dtype bf16
    python launch/reshard.py --input Llama-2-70b-hf --output 70B --mp 16 --dry_run
"""

import sys

from llama_mp import cli
from llama_mp.partial import clean_up_after_kill
from llama_mp.progress import Progress
from llama_mp.reshard_request import ReshardFlags, check_request, is_finished


def main(flags: ReshardFlags) -> int:
    checkpoint = check_request(flags)
    finished = is_finished(flags, checkpoint)
    if finished and not flags.dry_run:
        clean_up_after_kill(flags.output)
    if finished and not flags.check:
        print(f"{flags.output}: was whole already, nothing was written")
        return 0
    from llama_mp.checkpoint.reshard import Job

    job = Job.open(flags, checkpoint)
    for note in job.notes():
        print(note, file=sys.stderr)
    if flags.dry_run:
        print(job.description())
        job.check_space()
    elif finished:
        job.check(flags.output)
        print(f"{flags.output}: was whole already, and is equal to the input")
    else:
        with Progress("writing") as progress:
            num_continued = job.run(progress)
        print(job.summary(progress.seconds, num_continued))
    return 0


if __name__ == "__main__":
    cli.main(ReshardFlags, main, summary=__doc__)
