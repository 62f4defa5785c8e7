"""The prompts of one infer run, and where their answers go: standard output, or a file that a rerun continues."""

import hashlib
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llama_mp.answer import Answer, Codec, prompt_text
from llama_mp.attempt import Attempt
from llama_mp.attempt_output import AttemptOutput
from llama_mp.config import LogConfig, RunConfig, SamplingConfig
from llama_mp.errors import RequestError, say, shows_progress
from llama_mp.files import sample_digest
from llama_mp.flags import flag
from llama_mp.locate import Checkpoint
from llama_mp.output import Output
from llama_mp.prompts import BUILT_IN_PROMPTS, Prompt, read_prompts_file, read_standard_input
from llama_mp.records import RecordConfig
from llama_mp.run_file import fingerprint


@dataclass(frozen=True, kw_only=True)
class InferFlags(RunConfig, SamplingConfig, RecordConfig, LogConfig):
    prompt: str | None = flag(None, "one prompt; its answer streams to standard output")
    prompts_file: Path | None = flag(None, "prompts: .txt, one a line, or .jsonl with id, prompt or messages, any flag")
    chat: bool = flag(False, "apply the model's chat template to --prompt or to standard input")
    output: Path | None = flag(None, "write one JSON object per prompt to this .jsonl file; a rerun continues it")
    mp: int | None = flag(None, "start this many ranks; default: torchrun's, or 1, or in a job as planned")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompt is not None and self.prompts_file is not None:
            raise RequestError("--prompt and --prompts_file are both given: drop one")
        if self.chat and self.prompts_file is not None:
            raise RequestError(
                "--chat with --prompts_file: a prompts file says so itself, by messages in place of prompt"
            )

        if (self.logprobs or self.prompt_logprobs) and self.output is None:
            raise RequestError("--logprobs and --prompt_logprobs go into the records of --output: give one")

    @property
    def reads_standard_input(self) -> bool:
        return self.prompt is None and self.prompts_file is None


@dataclass(kw_only=True)
class Batch:
    """What an infer run has to answer: `answers` is without what an earlier run has finished."""

    answers: list[Answer]
    num_prompts: int  # of a task of an array those of its share
    num_blank: int  # lines of the prompts file that were left out
    codec: Codec
    output: Output | AttemptOutput | None

    @classmethod
    @contextmanager
    def open(cls, flags: InferFlags, checkpoint: Checkpoint) -> Iterator["Batch"]:
        """The batch of a request, its output locked while open. Raises RequestError before anything is changed."""
        codec = Codec(checkpoint, flags.chat_format)
        prompts, num_blank = read_prompts(flags)
        attempt = Attempt.of_environment()
        own = attempt.share_of(prompts) if attempt else prompts
        batch = cls(
            answers=answers_to(own, codec, flags),
            num_prompts=len(own),
            num_blank=num_blank,
            codec=codec,
            output=None,
        )
        if flags.output is None:
            yield batch
            return
        with open_output(flags.output, identity(flags, checkpoint, codec, prompts), prompts, attempt) as output:
            left = [answer for answer in batch.answers if answer.request.id not in output.done]
            yield replace(batch, answers=left, output=output)

    @property
    def has_work(self) -> bool:
        """Whether any prompt is left that can be served."""
        return any(not answer.is_finished for answer in self.answers)

    def show(self, stream: Iterator[tuple[Answer, str]]) -> None:
        """Take the answers as they come and put them where they belong."""
        if self.num_blank:
            say(f"{self.num_blank} blank lines of the prompts file were left out")
        if self.output is not None:
            self.write(stream)
        elif self.num_prompts == 1 and not self.answers[0].error:
            print_one(self.answers[0], stream)
        else:
            print_in_order(self.answers, stream)

    def write(self, stream: Iterable[tuple[Answer, str]]) -> None:
        """One record per answer, as each finishes."""
        done = self.num_prompts - len(self.answers)
        if done:
            say(f"{self.output.path}: {done} of {self.num_prompts} prompts are finished already")
        with tqdm(total=self.num_prompts, initial=done, unit=" prompts", disable=not shows_progress()) as progress:
            num_tokens, start = 0, time.perf_counter()
            for answer in finished(self.answers, stream):
                self.output.write(answer.record())
                num_tokens += len(answer.request.tokens)
                rate = num_tokens / (time.perf_counter() - start)
                progress.set_postfix_str(f"{rate:.1f} tokens/s", refresh=False)
                progress.update()


def finished(answers: Iterable[Answer], stream: Iterable[tuple[Answer, str]]) -> Iterator[Answer]:
    """Each answer once it is finished: first those that cannot be served."""
    yield from (answer for answer in answers if answer.error)
    yield from (answer for answer, _ in stream if answer.is_finished)


def read_prompts(flags: InferFlags) -> tuple[list[Prompt], int]:
    """--prompt, --prompts_file, standard input when it is a pipe, or the built-in prompts; and how many blank lines
    were left out of the file."""
    sampling = SamplingConfig(**{f.name: getattr(flags, f.name) for f in fields(SamplingConfig)})
    if flags.prompts_file is not None:
        return read_prompts_file(flags.prompts_file, sampling)
    text = flags.prompt if flags.prompt is not None else read_standard_input()
    texts = BUILT_IN_PROMPTS if text is None else (text,)
    return [one_prompt(str(i), text, flags.chat, sampling) for i, text in enumerate(texts)], 0


def one_prompt(id: str, text: str, chat: bool, sampling: SamplingConfig) -> Prompt:
    if chat:
        return Prompt(id=id, messages=({"role": "user", "content": text},), sampling=sampling)
    return Prompt(id=id, text=text, sampling=sampling)


def open_output(
    path: Path, fingerprint: dict[str, Any], prompts: Sequence[Prompt], attempt: Attempt | None
) -> Output | AttemptOutput:
    if attempt is None:
        return Output(path, fingerprint)
    return AttemptOutput(path, fingerprint, [prompt.id for prompt in prompts], attempt)


def answers_to(prompts: Sequence[Prompt], codec: Codec, flags: InferFlags) -> list[Answer]:
    """An answer for each prompt. In a file, one that cannot be served has an error; alone, it is the request's."""
    answers = [codec.answer(prompt, flags.max_seq_len) for prompt in prompts]
    if flags.prompts_file is None and answers and answers[0].error:  # a share may be empty
        raise RequestError(answers[0].error)
    return answers


def identity(flags: InferFlags, checkpoint: Checkpoint, codec: Codec, prompts: list[Prompt]) -> dict[str, Any]:
    """The fingerprint of a run: what changes its results, and nothing else."""
    names = [f.name for f in fields(SamplingConfig)] + ["dtype", "quant", "max_seq_len"]
    model = {
        "files": {file.name: sample_digest(file) for file in checkpoint.files},
        "tokenizer": sample_digest(checkpoint.tokenizer),
        "template": codec.template and hashlib.sha256(codec.template.encode()).hexdigest(),
        "end_ids": sorted(codec.tokenizer.eos_ids),
        "config": asdict(replace(checkpoint.config, name="")),  # a name may be that of the folder
    }
    given = {name: getattr(flags, name) for name in names} | ({"deterministic": True} if flags.deterministic else {})
    return fingerprint(model=model, flags=given, prompts=prompts)


def print_one(answer: Answer, stream: Iterable[tuple[Answer, str]]) -> None:
    """Text as it comes."""
    if answer.request.sampling.echo:
        print(prompt_text(answer.prompt), end="", flush=True)
    for _, piece in stream:
        print(piece, end="", flush=True)
    print(flush=True)


def print_in_order(answers: list[Answer], stream: Iterable[tuple[Answer, str]]) -> None:
    """Each prompt with its answer, in the order of the prompts, as soon as all before it are finished."""
    left = iter(answers)
    upcoming = next(left, None)
    for _ in finished(answers, stream):
        while upcoming is not None and upcoming.is_finished:
            text = f"[not answered: {upcoming.error}]" if upcoming.error else upcoming.text.strip()
            print(f"> {prompt_text(upcoming.prompt)}\n{text}\n", flush=True)
            upcoming = next(left, None)
