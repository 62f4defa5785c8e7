"""Hold a conversation with a LLaMA model, over any number of ranks.

Examples:
    python launch/chat.py
    python launch/chat.py --mp 2 --system "Answer in one sentence."
    torchrun --nproc_per_node 8 launch/chat.py --ckpt_dir ~/llama-mp/llama3-70b
"""

import os
from functools import partial

from llama_mp import cli
from llama_mp.chat import Chat, ChatFlags
from llama_mp.launcher import check_ranks, launch, must_launch
from llama_mp.locate import Checkpoint, locate
from llama_mp.memory import check_layout
from llama_mp.terminal import restored_terminal


def main(flags: ChatFlags) -> int:
    ranks = check_ranks(flags.mp)
    checkpoint = locate(flags)
    check_layout(checkpoint.config, ranks, flags.quant, flags.deterministic)
    is_leader = os.environ.get("RANK", "0") == "0"
    chat = Chat(flags, checkpoint) if is_leader else None  # refuses before any rank starts and any weight is read
    if must_launch(ranks):
        with restored_terminal():  # rank 0 does it too, unless it is killed
            return launch(ranks)
    return run(flags, checkpoint, chat)


def run(flags: ChatFlags, checkpoint: Checkpoint, chat: Chat | None) -> int:
    """One rank's part; rank 0 has the chat."""
    from llama_mp.llm import LLM
    from llama_mp.measure import end_run
    from llama_mp.parallel import connect

    world = connect(flags)
    with LLM.of_checkpoint(flags, checkpoint, world, codec=chat and chat.codec) as llm:
        if chat is None:
            llm.follow_to_end()
        else:
            chat.hold(partial(llm.stream, reuse=True))
            llm.dismiss()
        end_run(llm, flags)
    return 0


if __name__ == "__main__":
    cli.main(ChatFlags, main, summary=__doc__)
