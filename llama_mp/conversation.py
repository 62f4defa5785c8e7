"""What has been said so far, kept within the model's context."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from llama_mp.chat_format import check_messages
from llama_mp.errors import RequestError
from llama_mp.files import read_small

Message = dict[str, str]


class Conversation:
    """A system message, if there is one, and turns: a question and its answer each.

    After `ask` the last turn lacks its answer until `answer`; everything else keeps the turns whole."""

    def __init__(self, system: str | None = None) -> None:
        self.system = [message("system", system)] if system else []
        self.turns: list[Message] = []

    @property
    def messages(self) -> list[Message]:
        return self.system + self.turns

    def ask(self, question: str, encode: Callable[[Sequence[Message]], list[int]], room: int) -> int:
        """Add a question. Where the prompt then takes more than `room` tokens, drop the oldest turns until it takes
        three quarters of it, or the question is left alone: each time one goes, all behind it is computed anew. `turns`
        is another list then: whoever has the one before can go back to it.

        Returns how many turns were dropped. Raises RequestError, and changes nothing, when not even the question
        alone fits, or when it cannot be encoded."""
        turns = [*self.turns, message("user", question)]
        for start in range(0, len(turns), 2):
            length = len(encode(self.system + turns[start:]))
            may_fill = start in (0, len(turns) - 1)
            if length <= (room if may_fill else room * 3 // 4):
                self.turns = turns[start:]
                return start // 2
        also = " with the system message" if self.system else ""
        raise RequestError(f"the message takes {length} tokens{also}, and {room} fit: shorten it")

    def answer(self, text: str) -> None:
        self.turns.append(message("assistant", text))

    def reset(self) -> None:
        """Forget all but the system message."""
        self.turns = []

    def save(self, path: Path) -> None:
        """Write the messages to `path`, whole or not at all."""
        if not self.messages:
            raise RequestError("nothing has been said yet that could be saved")
        if path.is_dir():
            raise RequestError(f"{path} is a folder: name a file")
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            beside.write_text(json.dumps(self.messages, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
            os.replace(beside, path)
        except OSError as error:
            beside.unlink(missing_ok=True)
            raise RequestError(f"{path} cannot be written: {error.strerror}") from error

    def load(self, path: Path) -> None:
        """Go on with the conversation in `path`. Raises RequestError, and changes nothing, when it holds none."""
        content = read_small(path)
        try:
            messages = json.loads(content)
            json.dumps(messages, ensure_ascii=False).encode()  # JSON can spell half of a character, which nothing takes
            check_messages(messages)
        except (ValueError, RecursionError) as error:  # a RequestError is a ValueError
            raise RequestError(f"{path} is not a saved conversation: {error}") from error
        num_system = int(messages[0]["role"] == "system")
        turns = messages[num_system:]
        if [m["role"] for m in turns] != ["user", "assistant"] * (len(turns) // 2):
            raise RequestError(f"{path} is not a saved conversation: user and assistant must take turns, from user on")
        self.system, self.turns = messages[:num_system], turns


def message(role: str, content: str) -> Message:
    return {"role": role, "content": content}
