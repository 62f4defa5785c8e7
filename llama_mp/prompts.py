"""Where an infer run's prompts come from: a prompts file, standard input, or the three built in.

A fault in a file is a RequestError that begins with FILE:LINE, lines counted from 1 as editors do.
"""

import itertools
import json
import os
import stat
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_mp.attempt import Attempt
from llama_mp.config import SamplingConfig
from llama_mp.errors import RequestError

Messages = Sequence[Mapping[str, str]]

# Sentences to go on with, not questions: a base model completes, it does not answer.
BUILT_IN_PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "Once upon a time, in a village by the sea,",
)
MAX_LINE_BYTES = 1 << 23  # more text than any model has context for


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One request: either a `text` to continue or the `messages` of a chat, each with `role` and `content`."""

    id: str
    text: str | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None
    sampling: SamplingConfig

    def __post_init__(self) -> None:
        assert (self.text is None) != (self.messages is None), "a prompt has either text or messages"


def as_prompts(prompts: Sequence[str | Messages], sampling: SamplingConfig) -> list[Prompt]:
    if isinstance(prompts, str | bytes) or not isinstance(prompts, Sequence):
        raise RequestError(f"prompts is a {type(prompts).__name__}, but must be a list of texts or of messages")
    return [as_prompt(i, prompt, sampling) for i, prompt in enumerate(prompts)]


def as_prompt(index: int, prompt: str | Messages, sampling: SamplingConfig) -> Prompt:
    """`prompt` as infer would read it from a file; its id, which the randomness hangs on, is its index."""
    if isinstance(prompt, str):
        return Prompt(id=str(index), text=prompt, sampling=sampling)
    if not isinstance(prompt, Sequence):
        raise RequestError(f"prompts[{index}] is a {type(prompt).__name__}, but must be a text or a list of messages")
    return Prompt(id=str(index), messages=tuple(prompt), sampling=sampling)


def read_prompts_file(path: Path, sampling: SamplingConfig) -> tuple[list[Prompt], int]:
    """The prompts of a `.txt` or `.jsonl` file, and how many blank lines were left out.

    `.txt`: a prompt a line, its id the line's number from 0, blank lines counted. `.jsonl`: an object a line with
    `id`, `prompt` or `messages`, and any field of SamplingConfig, which then stands in for `sampling`'s.
    A byte order mark and CRLF are forgiven. Raises RequestError for anything else.
    """
    readers = {".txt": _text_prompt, ".jsonl": _json_prompt}
    if path.is_dir():
        raise RequestError(f"{path} is a folder; --prompts_file wants a .txt or .jsonl file")
    if path.suffix.lower() not in readers:
        raise RequestError(
            f"--prompts_file {path}: unknown kind {path.suffix!r}; "
            "valid: .txt (a prompt a line), .jsonl (an object a line)"
        )
    read, num_blank = readers[path.suffix.lower()], 0
    prompts: dict[str, tuple[int, Prompt]] = {}
    for number, line in enumerate(_lines(path)):
        if not line.strip():
            num_blank += 1
            continue
        try:
            prompt = read(line, number, sampling)
        except RequestError as error:
            raise RequestError(f"{path}:{number + 1}: {error}") from error
        if prompt.id in prompts:
            raise RequestError(
                f"{path}:{number + 1}: id {prompt.id!r} is that of line {prompts[prompt.id][0]} too; "
                "every prompt needs an id of its own"
            )
        prompts[prompt.id] = number + 1, prompt
    if not prompts:
        raise RequestError(f"{path} holds no prompt; write one a line")
    return [prompt for _, prompt in prompts.values()], num_blank


def read_standard_input() -> str | None:
    """All of standard input as one prompt, less its final newline, when it is a pipe, a socket or a file.

    None when it is a terminal, /dev/null or closed, and in a job, where it is nobody's. Reads until the writer closes
    its end. Raises RequestError when there is nothing in it but space, or when it is not UTF-8.
    """
    if sys.stdin is None or Attempt.of_environment():
        return None
    mode = os.fstat(sys.stdin.fileno()).st_mode
    if not (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or stat.S_ISREG(mode)):
        return None
    text = _decode(sys.stdin.buffer.read(), "standard input").removeprefix("\ufeff")
    text = text.removesuffix("\n").removesuffix("\r")
    if not text.strip():
        raise RequestError("standard input is empty; write a prompt to it, or give --prompt TEXT")
    return text


def _lines(path: Path) -> Iterator[str]:
    # Split at line feeds alone: str.splitlines would also cut at U+2028 and its like inside a prompt.
    try:
        if path.exists() and not path.is_file():
            raise RequestError(f"--prompts_file {path} is a pipe or a device, which might never end; give a file")
        with path.open("rb") as file:
            for number in itertools.count(1):
                line = file.readline(MAX_LINE_BYTES + 1)
                if len(line) > MAX_LINE_BYTES:
                    raise RequestError(f"{path}:{number}: the line has more than {MAX_LINE_BYTES} bytes; shorten it")
                if not line:
                    return
                line = line.removesuffix(b"\n").removesuffix(b"\r")
                yield _decode(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line, f"{path}:{number}")
    except OSError as error:
        raise RequestError(f"--prompts_file {path} cannot be read: {error.strerror}") from error


def _decode(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{where}: not UTF-8 (byte {raw[error.start]:#04x} at column {error.start + 1}); save it as UTF-8"
        ) from error


def _text_prompt(line: str, number: int, sampling: SamplingConfig) -> Prompt:
    return Prompt(id=str(number), text=line, sampling=sampling)


def _json_prompt(line: str, number: int, sampling: SamplingConfig) -> Prompt:
    values = _parse_object(line)
    if "id" not in values:
        raise RequestError('no id; give each line one, such as "id": "a1"')
    if ("prompt" in values) == ("messages" in values):
        raise RequestError(f"{'both' if 'prompt' in values else 'neither'} prompt and messages; give one of them")
    id = values.pop("id")
    if isinstance(id, bool) or not isinstance(id, str | int):
        raise RequestError(f"id is {json.dumps(id)}, but must be a text or a whole number")
    if "messages" in values:
        messages = _checked_messages(values.pop("messages"))
        return Prompt(id=str(id), messages=messages, sampling=sampling.override(values))
    text = values.pop("prompt")
    if not isinstance(text, str):
        raise RequestError(f"prompt is {json.dumps(text)}, but must be a text")
    return Prompt(id=str(id), text=text, sampling=sampling.override(values))


def _parse_object(line: str) -> dict[str, Any]:
    try:
        values = json.loads(line, object_pairs_hook=_without_repetition)
        # JSON can spell half of a surrogate pair, which is no character: no tokenizer and no output file takes it.
        json.dumps(values, ensure_ascii=False).encode()
    except RequestError:
        raise
    except UnicodeEncodeError as error:
        raise RequestError(f"half a surrogate pair (\\u{ord(error.object[error.start]):04x}) in a text") from error
    except json.JSONDecodeError as error:
        raise RequestError(f"not JSON: {error.msg} at column {error.colno}; write one object a line") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets thousands deep
        raise RequestError(f"not readable as JSON: {error}") from error
    if not isinstance(values, dict):
        raise RequestError(f'not an object but {line.strip()[:40]}; write {{"id": ..., "prompt": ...}}')
    return values


def _without_repetition(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise RequestError(f"field {name!r} is there twice; keep one")
        values[name] = value
    return values


def _checked_messages(messages: Any) -> tuple[dict[str, Any], ...]:
    if not isinstance(messages, list) or not messages:
        raise RequestError("messages must be a list of at least one object with role and content")
    for index, message in enumerate(messages):
        texts = [message.get("role"), message.get("content")] if isinstance(message, dict) else [None]
        if not all(isinstance(text, str) for text in texts):
            raise RequestError(f"messages[{index}] must be an object whose role and content are texts")
    return tuple(messages)
