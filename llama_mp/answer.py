"""The text side of a request: a prompt becomes ids, ids become text that can be shown, and in the end a record."""

from collections.abc import Mapping, Sequence
from typing import Any

from llama_mp.chat_format import render_chat
from llama_mp.config import ModelConfig, RunConfig
from llama_mp.errors import RequestError
from llama_mp.locate import Checkpoint
from llama_mp.prompts import Prompt
from llama_mp.request import Request
from llama_mp.tokenizer import TextStream, Tokenizer
from llama_mp.tokenizer_files import read_tokenizer

# Vocabularies are rounded up for speed, and grow by a few tokens in fine-tuning; another family's is far off.
MAX_UNUSED_ROWS = 1024


class Answer:
    """One prompt's request and the text that it has become so far.

    `text` holds what may be shown: never half a character, and nothing that may turn out to begin a stop text."""

    def __init__(self, prompt: Prompt, request: Request, tokenizer: Tokenizer, error: str | None = None) -> None:
        self.prompt, self.request, self.error = prompt, request, error
        self.text = ""
        self.held_back = ""
        self.num_read = 0
        self.met_stop = False
        self.stream = TextStream(tokenizer)

    @property
    def is_finished(self) -> bool:
        return self.request.finish_reason is not None

    def advance(self) -> str:
        """Read the request's new tokens; the text that they add. A stop text ends the request."""
        shown = len(self.text)
        for token in self.request.tokens[self.num_read :]:
            self.take(self.stream.push(token))
        self.num_read = len(self.request.tokens)
        if self.is_finished:
            self.take(self.stream.flush())
            self.text, self.held_back = self.text + self.held_back, ""
        return self.text[shown:]

    def take(self, piece: str) -> None:
        """Add `piece`, up to a stop text and nothing after it; hold back an end that may be the beginning of one."""
        if self.met_stop:
            return
        pending = self.held_back + piece
        stops = self.request.sampling.stop
        found = [pending.find(stop) for stop in stops if stop in pending]
        if found:
            pending = pending[: min(found)]
            self.request.finish_reason, self.met_stop = "stop", True
        keep = 0 if found else longest_beginning(pending, stops)
        self.text += pending[: len(pending) - keep]
        self.held_back = pending[len(pending) - keep :]

    def record(self) -> dict[str, Any]:
        """The JSON object of a finished request, as the commands' contract has it."""
        request, sampling = self.request, self.request.sampling
        prompt = prompt_text(self.prompt)
        record = {
            "id": request.id,
            "prompt": prompt,
            "completion": (prompt if sampling.echo else "") + self.text,
            "tokens": request.tokens,
            "logprobs": request.logprobs if sampling.logprobs else None,
            "prompt_logprobs": request.prompt_logprobs if sampling.prompt_logprobs else None,
            "finish_reason": request.finish_reason,
        }
        if self.error:
            record["error"] = self.error
        return record | {"prompt_tokens": len(request.prompt), "completion_tokens": len(request.tokens)}


def longest_beginning(text: str, stops: Sequence[str]) -> int:
    """The length of the longest end of `text` that begins one of `stops`."""
    lengths = range(min(len(text), max(map(len, stops), default=0)), 0, -1)
    return next((n for n in lengths if any(stop.startswith(text[-n:]) for stop in stops)), 0)


def prompt_text(prompt: Prompt) -> str:
    """What the user wrote: the text, or a conversation's last message; nothing for messages that are malformed."""
    if prompt.text is not None:
        return prompt.text
    last = prompt.messages[-1] if prompt.messages else None
    content = last.get("content") if isinstance(last, Mapping) else None
    return content if isinstance(content, str) else ""


class Codec:
    """A checkpoint's tokenizer and chat template: makes answers of prompts. Rank 0 alone needs one."""

    def __init__(self, checkpoint: Checkpoint, chat_format: str = "auto") -> None:
        self.tokenizer, self.template = read_tokenizer(checkpoint.tokenizer, checkpoint.path, chat_format)
        self.path = checkpoint.tokenizer
        self.config: ModelConfig = checkpoint.config
        if self.config.vocab_size:
            self.check_vocabulary(self.config.vocab_size)

    def check_vocabulary(self, num_rows: int) -> None:
        """Raise RequestError unless the tokenizer fits a model of `num_rows` embeddings, a few of them unused."""
        num_ids = self.tokenizer.vocab_size
        if not num_ids <= num_rows <= num_ids + MAX_UNUSED_ROWS:
            raise RequestError(
                f"the tokenizer {self.path} has {num_ids} ids, the model {self.config.name} {num_rows}: "
                "give the model's own with --tokenizer"
            )

    def encode(self, prompt: Prompt) -> list[int]:
        """The ids of `prompt`. Raises RequestError for one without tokens, or a chat without template."""
        if prompt.messages is not None:
            return render_chat(self.template, prompt.messages, self.tokenizer)
        ids = self.tokenizer.encode(prompt.text, bos=self.tokenizer.adds_bos)
        if not ids:
            raise RequestError("the prompt is empty, and this model's tokenizer begins no text by itself: write one")
        return ids

    def answer(self, prompt: Prompt, max_seq_len: int | None) -> Answer:
        """The answer that begins with `prompt`. One that cannot be served is finished, with an error."""
        error, ids = None, []
        try:
            ids = self.encode(prompt)
            self.check_length(ids, max_seq_len)
        except RequestError as refused:
            error = str(refused)
        request = Request(id=prompt.id, prompt=ids, sampling=prompt.sampling, finish_reason="error" if error else None)
        return Answer(prompt, request, self.tokenizer, error)

    def check_length(self, ids: Sequence[int], max_seq_len: int | None) -> None:
        """Raise RequestError unless the prompt leaves room for a token."""
        limit = max_seq_len or self.config.context_length
        if len(ids) >= limit:
            whose = "--max_seq_len is" if max_seq_len else f"the context of {self.config.name} is"
            raise RequestError(f"the prompt has {len(ids)} tokens, and {whose} {limit}: shorten the prompt")


def needed_length(answers: Sequence[Answer], config: ModelConfig, max_seq_len: int | None) -> int:
    """Positions that a row of the cache needs for the longest of `answers`, within the model's context."""
    if max_seq_len:
        return max_seq_len
    wanted = (len(a.request.prompt) + a.request.sampling.max_gen_len for a in answers if not a.is_finished)
    return min(max(wanted, default=1), config.context_length)


def needed_shape(answers: Sequence[Answer], config: ModelConfig, run: RunConfig) -> list[int]:
    """Slots and positions of the cache that `answers` need."""
    num_slots = min(run.max_batch_size, sum(not answer.is_finished for answer in answers))
    return [max(1, num_slots), needed_length(answers, config, run.max_seq_len)]


def largest_shape(answers: Sequence[Answer], config: ModelConfig, run: RunConfig) -> list[int]:
    """The same of any cache to come, where the answers are not known yet."""
    if answers:
        return needed_shape(answers, config, run)
    return [run.max_batch_size, run.max_seq_len or config.context_length]
