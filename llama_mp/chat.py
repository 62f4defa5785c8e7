"""A conversation at the terminal: questions and commands in, answers out as they come. Rank 0 alone holds one."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from llama_mp.answer import Answer, Codec
from llama_mp.config import DrawingConfig, RunConfig, SamplingConfig
from llama_mp.conversation import Conversation, Message
from llama_mp.errors import RequestError, counted, did_you_mean, say
from llama_mp.flags import flag
from llama_mp.locate import Checkpoint
from llama_mp.prompts import Prompt
from llama_mp.records import RecordConfig
from llama_mp.terminal import Terminal

PROMPT = "> "
HELP = """\
/reset      forget what was said; the system message stays
/save FILE  write the conversation to a file
/load FILE  go on with a conversation from a file
/help       print this
/quit       end; Ctrl-D does it too
Ctrl-C stops an answer, and empties the line that is being typed."""

Stream = Callable[[Sequence[Answer]], Iterator[tuple[Answer, str]]]


@dataclass(frozen=True, kw_only=True)
class ChatFlags(RunConfig, DrawingConfig, RecordConfig):
    system: str | None = flag(None, "what the model is told before the conversation begins")
    max_gen_len: int = flag(1024, "tokens of an answer at most")
    max_batch_size: int = flag(1, "rows computed at once: a conversation is one")
    mp: int | None = flag(None, "start this many ranks on this machine; default: torchrun's, or 1")


class Chat:
    """One session. `hold` it with a model's `stream`."""

    def __init__(self, flags: ChatFlags, checkpoint: Checkpoint) -> None:
        """Raises RequestError when the checkpoint cannot hold a conversation, or not with this system message."""
        self.codec = Codec(checkpoint, flags.chat_format)
        self.max_seq_len = flags.max_seq_len
        self.sampling = SamplingConfig(**{f.name: getattr(flags, f.name) for f in fields(DrawingConfig)})
        limit = flags.max_seq_len or checkpoint.config.context_length
        self.room = limit - min(flags.max_gen_len, limit // 2)  # what a prompt may take, so that an answer has room
        self.num_asked = 0
        self.conversation = Conversation(flags.system)
        Conversation(flags.system).ask("?", self.encode, self.room)

    def encode(self, messages: Sequence[Message]) -> list[int]:
        return self.codec.encode(self.prompt(messages))

    def prompt(self, messages: Sequence[Message]) -> Prompt:
        """The number of the question is its id, so that the same question again draws other random numbers."""
        return Prompt(id=str(self.num_asked), messages=tuple(messages), sampling=self.sampling)

    def hold(self, stream: Stream) -> None:
        """Answer questions and obey commands until the end of input or /quit."""
        with Terminal() as terminal:
            if terminal.is_terminal:
                say("/help lists the commands; Ctrl-C stops an answer, Ctrl-D ends.")
            while (line := terminal.ask(PROMPT)) is not None:
                words = line.split(maxsplit=1)
                if words[:1] == ["/quit"]:
                    return
                try:
                    if words and words[0].startswith("/"):
                        self.obey(words[0], "".join(words[1:]).strip())
                    elif words:
                        self.answer(line, stream, terminal)
                except RequestError as error:  # one line was wrong, the session goes on
                    say(str(error))

    def obey(self, command: str, argument: str) -> None:
        """Run a command other than /quit. Raises RequestError for one that there is not."""
        if command == "/reset":
            self.conversation.reset()
            say("forgotten")
        elif command == "/help":
            say(HELP)
        elif command not in ("/save", "/load"):
            known = ("/reset", "/save", "/load", "/help", "/quit")
            raise RequestError(f"unknown command {command}{did_you_mean(command, known)}; commands: {', '.join(known)}")
        elif not argument:
            raise RequestError(f"{command} needs a file: {command} FILE")
        else:
            path = Path(os.path.expanduser(argument))
            (self.conversation.save if command == "/save" else self.conversation.load)(path)
            turns = counted(len(self.conversation.turns) // 2, "turn")
            say(f"{path}: {turns} {'saved' if command == '/save' else 'loaded'}")

    def answer(self, question: str, stream: Stream, terminal: Terminal) -> None:
        """Print the answer as it comes, and remember what was said of it."""
        before = self.conversation.turns
        dropped = self.conversation.ask(question, self.encode, self.room)
        if dropped:
            say(f"the context is full: the oldest {counted(dropped, 'turn')} dropped")
        answer = self.codec.answer(self.prompt(self.conversation.messages), self.max_seq_len)
        self.num_asked += 1
        try:
            with terminal.listening() as interrupted:
                for _, piece in stream([answer]):
                    print(piece, end="", flush=True)
                    if not answer.is_finished and interrupted():
                        answer.request.finish_reason = "stop"  # the stream ends by itself: the ranks stay in step
                        print(answer.advance(), end="")
                print(flush=True)
        except RequestError as error:  # the cache that it needs does not fit
            self.conversation.turns = before
            raise RequestError(f"{error}; or /reset") from error
        self.conversation.answer(answer.text)
