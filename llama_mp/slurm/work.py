"""What a job will have to do, as far as that can be told before it runs; and all that its verb would refuse."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from llama_mp.answer import Codec
from llama_mp.batch import answers_to, identity, one_prompt, read_prompts
from llama_mp.bench import find_model
from llama_mp.config import ModelConfig, RunConfig, load_size
from llama_mp.errors import RequestError
from llama_mp.headers import whole_config
from llama_mp.locate import Checkpoint, check_context, locate, locate_weights, path_of_size
from llama_mp.memory import Workload, checkpoint_bytes
from llama_mp.output import check_place
from llama_mp.parts import Parts, size_bytes
from llama_mp.prompts import BUILT_IN_PROMPTS, Prompt
from llama_mp.reshard_request import ReshardFlags, check_output, check_request, is_finished
from llama_mp.run_file import as_read_back, check_same_run
from llama_mp.slurm.flags import BenchJobFlags, InferJobFlags, ModelJobFlags

BENCH_RUNS = 4  # one warms up
TEMPLATE_TOKENS = 64  # at most, around a message


@dataclass(frozen=True, kw_only=True)
class Work:
    """A model to run. `tokens`: to generate one after another, if rows were computed one at a time."""

    config: ModelConfig
    workload: Workload
    checkpoint_bytes: int
    num_files: int  # of Meta's shards; 0: unknown
    tokens: int
    force: bool


class Row(NamedTuple):
    """What a prompt asks of the cache and of the time, in tokens."""

    prompt_len: int
    gen_len: int


Located = tuple[ModelConfig, Checkpoint | None]  # None: its files are not here, or not yet


# ---- infer ---------------------------------------------------------------------------------------------------------


def infer_work(flags: InferJobFlags, notes: list[str]) -> Work | None:
    """None where nothing can be known of the checkpoint yet. Raises RequestError as infer would; what is to be said
    besides goes to `notes`."""
    if flags.output is not None:
        check_place(flags.output)
    prompts = prompts_of(flags, notes)
    located = find(flags, locate, notes)
    if located is None:
        return None
    config, checkpoint = located
    rows = [most_tokens(prompt) for prompt in prompts] if checkpoint is None else rows_of(flags, checkpoint, prompts)
    longest = max((row.prompt_len + row.gen_len for row in rows), default=2)
    seq_len = flags.max_seq_len or max(2, min(longest, config.context_length))
    share = -(-len(rows) // (flags.array or 1))
    return work(
        flags,
        located,
        num_rows=max(1, min(flags.max_batch_size, share)),
        seq_len=seq_len,
        tokens=sum(min(row.gen_len, seq_len) for row in rows) // (flags.array or 1),
    )


def prompts_of(flags: InferJobFlags, notes: list[str]) -> list[Prompt]:
    """The prompts of the job: what is piped into this command does not reach it."""
    if not flags.reads_standard_input:
        return read_prompts(flags)[0]
    notes.append("neither --prompt nor --prompts_file is given: the job continues the built-in prompts")
    return [one_prompt(str(i), text, flags.chat, flags) for i, text in enumerate(BUILT_IN_PROMPTS)]


def rows_of(flags: InferJobFlags, checkpoint: Checkpoint, prompts: list[Prompt]) -> list[Row]:
    """Those that can be served."""
    codec = Codec(checkpoint, flags.chat_format)
    answers = answers_to(prompts, codec, flags)
    if flags.output is not None:
        check_output_file(flags, as_read_back(identity(flags, checkpoint, codec, prompts)))
    requests = [answer.request for answer in answers if not answer.is_finished]
    return [Row(len(request.prompt), request.sampling.max_gen_len) for request in requests]


def check_output_file(flags: InferJobFlags, fingerprint: Mapping[str, Any]) -> None:
    """Raise RequestError where --output holds another run's lines, or a job writes it that this one does not await."""
    parts = Parts(flags.output)
    if flags.after is None:
        parts.refuse_others(None)
    in_parts = parts.hold_lines()
    if in_parts or size_bytes(flags.output):
        check_same_run(flags.output, fingerprint, [parts.folder] if in_parts else [])


def most_tokens(prompt: Prompt) -> Row:
    """Without a tokenizer: no token is shorter than a byte."""
    messages = prompt.messages or ()
    text = prompt.text if prompt.text is not None else json.dumps(messages, ensure_ascii=False)
    return Row(len(text.encode()) + 1 + TEMPLATE_TOKENS * len(messages), prompt.sampling.max_gen_len)


# ---- bench and reshard ---------------------------------------------------------------------------------------------


def bench_work(flags: BenchJobFlags, notes: list[str]) -> Work | None:
    checkpoint = find_model(flags) if flags.random_weights else None
    located = (checkpoint.config, checkpoint) if checkpoint else find(flags, locate_weights, notes)
    if located is None:
        return None
    run = flags.completed(located[0])
    num_runs = BENCH_RUNS * (2 if flags.deterministic else 1)  # beside the ordinary mode
    tokens = num_runs * flags.batch_size * flags.gen_len
    return work(flags, located, num_rows=run.max_batch_size, seq_len=run.max_seq_len, tokens=tokens)


def reshard_bytes(flags: ReshardFlags, *, may_be_absent: bool) -> tuple[str, int] | None:
    """The model's name, and the bytes to read and to write; None for an input that is not here, or not yet."""
    if may_be_absent and not flags.input.exists():
        check_output(flags.output)
        return None
    checkpoint = check_request(flags)
    if is_finished(replace(flags, dry_run=True), checkpoint) and not flags.check:
        raise RequestError(f"--output {flags.output} is whole already: there is nothing to submit")
    read = sum(file.stat().st_size for file in checkpoint.files)
    config = whole_config(checkpoint)
    dtype = flags.dtype if flags.dtype != "keep" else stored_dtype(config, read)
    return config.name, (read + checkpoint_bytes(config, dtype)) * (2 if flags.check else 1)


# ---- the model -----------------------------------------------------------------------------------------------------


def find(flags: ModelJobFlags, locate: Callable[[RunConfig], Checkpoint], notes: list[str]) -> Located | None:
    """The model, and where its files lie. Raises RequestError where they do not, unless another job is to write them
    first, or the script is only to be seen."""
    if flags.after is not None and flags.ckpt_dir is not None and not flags.ckpt_dir.exists():
        return shape_alone(flags) if flags.size else None
    if flags.dry_run and flags.size and flags.ckpt_dir is None:
        try:
            path_of_size(load_size(flags.size))
        except RequestError as absent:
            notes.append(f"{absent}; planned from the size alone")
            return shape_alone(flags)
    checkpoint = locate(flags)
    return whole_config(checkpoint), checkpoint


def shape_alone(flags: ModelJobFlags) -> Located:
    config = load_size(flags.size)
    check_context(flags, config)
    return config, None


def work(flags: ModelJobFlags, located: Located, *, num_rows: int, seq_len: int, tokens: int) -> Work:
    config, checkpoint = located
    files = checkpoint.files if checkpoint else ()
    num_bytes = sum(file.stat().st_size for file in files)
    on_cpu = flags.device == "cpu"
    dtype = flags.dtype
    if dtype == "auto":  # as machine.py chooses, where it knows the card and has read the weights' types
        dtype = stored_dtype(config, num_bytes)
        dtype = "bf16" if on_cpu and dtype == "fp16" else dtype
    return Work(
        config=config,
        workload=Workload(
            dtype=dtype,
            quant=flags.quant,
            offload=flags.offload,
            batch_size=num_rows,
            seq_len=seq_len,
            device="cpu" if on_cpu else "cuda",
            deterministic=flags.deterministic,
        ),
        checkpoint_bytes=num_bytes or checkpoint_bytes(config, "fp16"),
        num_files=len(files) if checkpoint and checkpoint.kind == "meta" else 0,
        tokens=tokens,
        force=flags.force,
    )


def stored_dtype(config: ModelConfig, num_bytes: int) -> str:
    """fp32 where the files are too large for anything shorter, else what takes 2 bytes."""
    return "fp32" if num_bytes > 1.5 * checkpoint_bytes(config, "fp16") else "fp16"
