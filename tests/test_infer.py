"""The command from end to end, as users start it: plain, by --mp, by torchrun."""

import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
from running import INFER, Done, infer, run, start, torchrun

from llama_mp import LLM

QUESTION, ANSWER = "What is the capital of France?", "The capital of France is Paris."
KEYS = ["id", "prompt", "completion", "tokens", "logprobs", "prompt_logprobs", "finish_reason"]
COUNTS = ["prompt_tokens", "completion_tokens"]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    """14 prompts with ids of their own, and one that no row of 64 positions can hold."""
    file = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    lines = [{"id": f"p{i}", "prompt": "The quick brown fox " + "jumps " * (i % 7)} for i in range(14)]
    lines.insert(5, {"id": "long", "prompt": "word " * 200})
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.fixture(scope="module")
def no_torch(tmp_path_factory) -> dict[str, str]:
    """An environment in which `import torch` ends the process with a code that no command has."""
    folder = tmp_path_factory.mktemp("no_torch")
    (folder / "torch.py").write_text("import os\nos._exit(99)\n")
    return {"PYTHONPATH": str(folder)}


@pytest.fixture
def batch_flags(tiny, prompts) -> list[str | Path]:
    return ["--ckpt_dir", tiny, "--prompts_file", prompts, "--max_seq_len", "64", "--logprobs", "--temperature", "0.8"]


def records(path: Path) -> dict[str, dict]:
    """The records of an output by id, each of which is there once."""
    lines = path.read_bytes().splitlines()
    by_id = {record["id"]: record for record in map(json.loads, lines)}
    assert len(by_id) == len(lines)
    return by_id


def assert_equal(here: dict[str, dict], there: dict[str, dict]) -> None:
    """Equal records; log-probabilities to 1e-4, because another MP degree adds in another order."""
    assert here.keys() == there.keys()
    for id, record in here.items():
        assert {**record, "logprobs": None} == {**there[id], "logprobs": None}
        assert record["logprobs"] == pytest.approx(there[id]["logprobs"], abs=1e-4)


# ---- a real model's answer ---------------------------------------------------------------------------------------

END_LINE = re.compile(
    r"loaded \d+\.\d\d GB in \d+\.\d s \(\d+\.\d\d GB/s\); TTFT \d+\.\d{3} s; \d+\.\d tokens/s; \d+\.\d GB/s; "
    r"peak memory \d+\.\d\d GB per rank \(planned \d+\.\d\d GB\)"
)


def assert_answers(done: Done) -> None:
    """The one right answer on stdout, and nothing else; stderr ends with what it took."""
    assert (done.code, done.stdout) == (0, ANSWER + "\n"), done
    assert END_LINE.fullmatch(done.stderr.splitlines()[-1]), done.stderr


def ask(*flags: str | Path) -> Done:
    return infer("--chat", "--temperature", "0", "--prompt", QUESTION, *flags)


@pytest.mark.parametrize("mp", ["2", pytest.param("4", marks=pytest.mark.slow)])
def test_the_default_model_answers_over_ranks_that_it_starts(mp):
    done = ask("--mp", mp)
    assert_answers(done)
    assert re.search(f"over {mp} ranks: padding and repeated KV heads add \\d+\\.\\d% to the weights", done.stderr)


def test_the_default_model_answers_a_pipe_under_torchrun():
    assert_answers(torchrun(3, INFER, "--chat", "--temperature", "0", text=QUESTION + "\n"))


def test_one_answer_streams_as_utf8(monkeypatch):
    monkeypatch.setenv("LLAMA_MP_THREADS", "1")  # as the command has it, for the same bits
    prompt = "Caf\u00e9 \U0001f600 means"
    flags = ["--prompt", prompt, "--echo", "--max_gen_len", "40", "--temperature", "0"]
    started = start(sys.executable, INFER, *flags, LC_ALL="C", LANG="C")
    first = started.first_byte()
    assert started.process.poll() is None  # there is text while the rest is being made
    done = started.wait()
    with LLM() as llm:
        (whole,) = llm.generate([prompt], echo=True, max_gen_len=40, temperature=0)
    assert (done.code, first + done.stdout) == (0, whole["completion"] + "\n")


# ---- a file of prompts -------------------------------------------------------------------------------------------


def wait_for_lines(path: Path, count: int) -> None:
    for _ in range(600):
        if path.exists() and path.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.05)
    raise AssertionError(f"{path} did not get {count} lines")


def test_a_killed_run_is_continued_over_other_ranks_and_equals_a_whole_one(batch_flags, no_torch, tmp_path):
    whole, path = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    assert infer(*batch_flags, "--output", whole, "--max_batch_size", "3").code == 0
    expected = records(whole)
    assert len(expected) == 15
    assert [id for id, record in expected.items() if record["finish_reason"] == "error"] == ["long"]
    assert "--max_seq_len is 64" in expected["long"]["error"]
    assert all(list(r) == KEYS + (["error"] if "error" in r else []) + COUNTS for r in expected.values())

    killed = start(sys.executable, INFER, *batch_flags, "--output", path, "--max_batch_size", "1")
    wait_for_lines(path, 3)
    killed.process.kill()
    assert killed.wait().code == -signal.SIGKILL
    num_done = path.read_bytes().count(b"\n")
    assert num_done < 15
    with path.open("ab") as file:
        file.write(b'{"id": "p13", "comp')  # what a kill within a line leaves

    done = infer(*batch_flags, "--output", path, "--mp", "2")
    assert (done.code, done.stdout) == (0, "")
    assert f"{num_done} of 15 prompts are finished already" in done.stderr
    assert_equal(records(path), expected)

    before = path.read_bytes()
    for flags in ([], ["--mp", "2"]):
        again = infer(*batch_flags, "--output", path, *flags, **no_torch)  # so it starts no rank and loads nothing
        assert (again.code, again.stdout, again.stderr) == (0, "", f"{path}: 15 of 15 prompts are finished already\n")
    refused = infer(*batch_flags, "--output", path, "--seed", "2", **no_torch)
    assert "flags.seed was 1 there and is 2 now" in refused.refusal
    assert path.read_bytes() == before


def test_several_answers_are_printed_in_order(tiny, tmp_path):
    file = tmp_path / "prompts.jsonl"
    lengths = [20, 1, 5, 1]  # the later ones finish first
    lines = [{"id": i, "prompt": f"Once {i}", "max_gen_len": length} for i, length in enumerate(lengths)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = infer("--ckpt_dir", tiny, "--prompts_file", file)
    assert done.code == 0
    assert [line for line in done.stdout.splitlines() if line.startswith("> Once")] == [f"> Once {i}" for i in range(4)]


# ---- stopped -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [[], ["--mp", "2"]])
def test_ctrl_c_ends_a_run_without_a_word(flags):
    command = (sys.executable, INFER, "--prompt", "Once upon a time", "--max_gen_len", "4000", *flags)
    started = start(*command)
    assert started.first_byte()  # it is generating
    os.kill(started.process.pid, signal.SIGINT)
    done = started.wait(timeout=60)
    assert done.code == 130
    assert "error: " not in done.stderr and "Traceback" not in done.stderr and "torch" not in done.stderr
    assert started.living() == []


def test_a_reader_that_leaves_ends_the_run():
    flags = "--prompt 'Count:' --max_gen_len 4000 --temperature 1"
    done = run("sh", "-c", f'"{sys.executable}" "{INFER}" {flags} | head -c 20', timeout=60)
    assert (done.code, len(done.stdout.encode())) == (0, 20)
    assert "error: " not in done.stderr and "Traceback" not in done.stderr and "Exception" not in done.stderr


# ---- refused -----------------------------------------------------------------------------------------------------


def within_a_second(*flags: str, **env: str) -> Done:
    """What it answers; on a busy machine one time out of three is enough."""
    for _ in range(3):
        begin = time.perf_counter()
        done = infer(*flags, **env)
        if time.perf_counter() - begin < 1:
            return done
    raise AssertionError(f"{flags} took more than a second")


def test_help_and_refusals_that_need_no_file_answer_within_a_second(no_torch):
    for flags, says in (
        (["--help"], None),
        (["--temprature", "0.1"], "did you mean --temperature?"),
        (["--size", "14B"], "did you mean 13B?"),
        (["--temperature", "warm"], "--temperature is 'warm', but must be a finite number"),
        (["--prompt", "Hi", "--prompts_file", "p.txt"], "drop one"),
        (["--mp", "0"], "--mp is 0"),
        (["--output"], "--output has no value"),
    ):
        done = within_a_second(*flags, **no_torch)
        if says is None:
            assert done.code == 0 and "\n    torchrun --nproc_per_node 8" in done.stdout and done.stderr == ""
        else:
            assert says in done.refusal


@pytest.fixture(scope="module")
def broken(tiny, tmp_path_factory) -> Path:
    """A folder of checkpoints that lack something."""
    folder = tmp_path_factory.mktemp("broken checkpoints")
    for name in ("empty", "shard", "params", "tokenizer"):
        (folder / name).mkdir()
    for name, files in (
        ("shard", ["consolidated.01.pth", "params.json", "tokenizer.model"]),
        ("params", ["consolidated.00.pth", "consolidated.01.pth", "tokenizer.model"]),
        ("tokenizer", ["consolidated.00.pth", "consolidated.01.pth", "params.json"]),
    ):
        for file in files:
            (folder / name / file).symlink_to(tiny / file)
    return folder


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("empty", "holds no checkpoint"),
        ("nowhere", "no such folder or file"),
        ("shard", "lacks consolidated.00.pth of 2 shards"),
        ("params", "lacks params.json"),
        ("tokenizer", "no tokenizer.model or tokenizer.json in"),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_refused_without_torch(broken, no_torch, name, says):
    for flags in ([], ["--mp", "2"]):
        refusal = infer("--ckpt_dir", broken / name, "--prompt", "Hi", *flags, **no_torch).refusal
        assert says in refusal and str(broken / name) in refusal


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--mp", "99"], "99 ranks for model smollm2-135m with 9 attention heads: use between 1 and 9"),
        (["--prompt", "one two three four", "--max_seq_len", "2"], "the prompt has 4 tokens, and --max_seq_len is 2"),
        (["--prompt", ""], "the prompt is empty"),
        (["--prompts_file", "/nowhere/prompts.txt"], "/nowhere/prompts.txt cannot be read"),
        (["--prompt", "Hi", "--output", "/nowhere/out.jsonl"], "there is no folder /nowhere"),
        (["--size", "65B"], "no checkpoint of 65B at /models/65B: put it there"),
        (["--prompt", "Hi", "--tokenizer", "/nowhere/tokenizer.model"], "no tokenizer at /nowhere/tokenizer.model"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_without_torch(no_torch, flags, says):
    assert says in infer(*flags, LLAMA_MP_HOME="/models", **no_torch).refusal


def test_under_torchrun_one_rank_speaks(tmp_path):
    done = torchrun(2, INFER, "--ckpt_dir", tmp_path, "--prompt", "Hi")
    assert done.code == 1  # torchrun's own
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "holds no checkpoint" in errors[0]
