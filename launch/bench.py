"""Measure a model's speed on this machine, over any number of ranks: the physical ceiling first, then what is reached.

The last line is the result in JSON.

Examples:
    torchrun --nproc_per_node 8 launch/bench.py --size 65B --random_weights
    python launch/bench.py --mp 2 --prompt_len 512 --batch_size 4
    python launch/bench.py --ckpt_dir ~/llama-mp/llama3-8b --dtype bf16 --json result.json
"""

from llama_mp import cli
from llama_mp.bench import BenchFlags, find_model
from llama_mp.launcher import check_ranks, launch, must_launch
from llama_mp.memory import check_layout


def main(flags: BenchFlags) -> int:
    ranks = check_ranks(flags.mp)
    checkpoint = find_model(flags)
    check_layout(checkpoint.config, ranks, flags.quant, flags.deterministic)
    flags.completed(checkpoint.config)  # refuses rows that do not fit before any rank starts
    if must_launch(ranks):
        return launch(ranks)
    from llama_mp.measure import run_bench

    run_bench(flags, checkpoint)
    return 0


if __name__ == "__main__":
    cli.main(BenchFlags, main, summary=__doc__)
