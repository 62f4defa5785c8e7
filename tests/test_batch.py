"""Where prompts come from and answers go: ways to ask, what makes two runs the same one, the order on stdout."""

import json
import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from running import run

from llama_mp.answer import Answer
from llama_mp.batch import Batch, InferFlags, finished, identity, print_in_order, print_one, read_prompts
from llama_mp.config import ModelConfig, SamplingConfig
from llama_mp.errors import RequestError
from llama_mp.locate import Checkpoint, locate
from llama_mp.output import Output
from llama_mp.prompts import BUILT_IN_PROMPTS, Prompt
from llama_mp.request import Request

CONFIG = ModelConfig(name="tiny", dim=8, num_layers=1, num_heads=1, num_kv_heads=1, hidden_dim=8, vocab_size=9)


def texts(prompts: list[Prompt]) -> list[tuple[str, str | None]]:
    return [(prompt.id, prompt.text) for prompt in prompts]


# ---- where prompts come from -------------------------------------------------------------------------------------


def test_one_prompt_and_its_sampling():
    (prompt,), _ = read_prompts(InferFlags(prompt="Hi", seed=7, stop=("x",)))
    assert (prompt.id, prompt.text, prompt.messages) == ("0", "Hi", None)
    assert prompt.sampling == SamplingConfig(seed=7, stop=("x",))


def test_chat_makes_a_conversation_of_the_prompt():
    (prompt,), _ = read_prompts(InferFlags(prompt="Hi", chat=True))
    assert (prompt.text, prompt.messages) == (None, ({"role": "user", "content": "Hi"},))


def test_a_text_file_is_a_prompt_a_line(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\ntwo\n")
    prompts, num_blank = read_prompts(InferFlags(prompts_file=file))
    assert texts(prompts) == [("0", "one"), ("2", "two")]
    assert num_blank == 1


def test_a_line_of_a_jsonl_file_has_its_own_flags(tmp_path):
    file = tmp_path / "prompts.jsonl"
    lines = [{"id": "a", "prompt": "one", "seed": 3}, {"id": 2, "messages": [{"role": "user", "content": "two"}]}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (first, second), _ = read_prompts(InferFlags(prompts_file=file, seed=5))
    assert (first.id, first.text, first.sampling.seed) == ("a", "one", 3)
    assert (second.id, second.messages[0]["content"], second.sampling.seed) == ("2", "two", 5)


READ = """
import json
from llama_mp.batch import InferFlags, read_prompts
print(json.dumps([prompt.text for prompt in read_prompts(InferFlags())[0]]))
"""


def test_a_pipe_is_one_prompt():
    done = run(sys.executable, "-c", READ, text="Say:\n caf\u00e9 \n")
    assert json.loads(done.stdout) == ["Say:\n caf\u00e9 "]


def test_a_file_as_standard_input_is_one_prompt(tmp_path):
    (tmp_path / "prompt").write_text("Hello\n")
    with open(tmp_path / "prompt") as file:
        out = subprocess.run([sys.executable, "-c", READ], stdin=file, capture_output=True, timeout=60, check=True)
    assert json.loads(out.stdout) == ["Hello"]


def test_in_a_job_standard_input_is_nobodys():
    done = run(sys.executable, "-c", READ, text="Say:", LLAMA_MP_ATTEMPT="12-0")
    assert json.loads(done.stdout) == list(BUILT_IN_PROMPTS)


def test_no_input_and_a_terminal_give_the_built_in_prompts():
    assert json.loads(run(sys.executable, "-c", READ).stdout) == list(BUILT_IN_PROMPTS)
    master, terminal = os.openpty()
    out = subprocess.run([sys.executable, "-c", READ], stdin=terminal, capture_output=True, timeout=60, check=True)
    os.close(master)
    os.close(terminal)
    assert json.loads(out.stdout) == list(BUILT_IN_PROMPTS)


@pytest.mark.parametrize("other", [{"prompt": "Hi"}, {"chat": True}])
def test_flags_that_exclude_a_prompts_file(other):
    with pytest.raises(RequestError, match="--prompts_file"):
        InferFlags(prompts_file=Path("p.txt"), **other)


# ---- what makes two runs the same --------------------------------------------------------------------------------

OTHER_SAMPLING = {
    "max_gen_len": 9,
    "temperature": 0.1,
    "top_p": 0.5,
    "top_k": 3,
    "min_p": 0.2,
    "repetition_penalty": 1.5,
    "seed": 2,
    "stop": ("x",),
    "logprobs": True,
    "prompt_logprobs": True,
    "echo": True,
}


@pytest.fixture
def checkpoint(tmp_path) -> Checkpoint:
    files = tuple(tmp_path / name for name in ("consolidated.00.pth", "tokenizer.model"))
    for file in files:
        file.write_text("something")
    return Checkpoint(path=tmp_path, kind="meta", files=files[:1], config=CONFIG, tokenizer=files[1])


def identity_of(checkpoint: Checkpoint, **flags) -> dict:
    return identity_with(checkpoint, "{{ messages }}", {2}, **flags)


def identity_with(checkpoint: Checkpoint, template: str | None, end_ids: set[int], **flags) -> dict:
    made = InferFlags(**{"prompt": "Hi", "output": Path("out.jsonl")} | flags)
    codec = SimpleNamespace(template=template, tokenizer=SimpleNamespace(eos_ids=frozenset(end_ids)))
    return identity(made, checkpoint, codec, read_prompts(made)[0])


def test_another_template_or_end_is_another_run(checkpoint):
    base = identity_with(checkpoint, "a", {2, 3})
    assert base == identity_with(checkpoint, "a", {3, 2})
    for template, end_ids in ((None, {2, 3}), ("b", {2, 3}), ("a", {2})):
        assert identity_with(checkpoint, template, end_ids) != base


def test_every_sampling_flag_changes_the_run(checkpoint):
    assert OTHER_SAMPLING.keys() == {field.name for field in fields(SamplingConfig)}
    base = identity_of(checkpoint)
    for name, value in OTHER_SAMPLING.items():
        assert identity_of(checkpoint, **{name: value}) != base, name


def test_the_chat_format_asked_for_is_taken():
    flags = InferFlags(prompt="Hi", chat=True, chat_format="llama3")
    with (
        pytest.raises(RequestError, match="--chat_format llama3 needs the special tokens"),
        Batch.open(flags, locate(flags)),
    ):
        pass


@pytest.mark.parametrize(
    "flags", [{"dtype": "fp32"}, {"chat": True}, {"max_seq_len": 99}, {"prompt": "Ho"}, {"deterministic": True}]
)
def test_what_changes_results_changes_the_run(checkpoint, flags):
    assert identity_of(checkpoint, **flags) != identity_of(checkpoint)


def test_another_model_or_tokenizer_is_another_run(checkpoint, tmp_path):
    base = identity_of(checkpoint)
    for file in (*checkpoint.files, checkpoint.tokenizer):
        file.write_text("something else")
        assert identity_of(checkpoint) != base
        base = identity_of(checkpoint)
    assert identity_of(replace(checkpoint, config=replace(CONFIG, rope_theta=5e5))) != base
    elsewhere = tmp_path / "elsewhere" / checkpoint.files[0].name  # one name, two files
    elsewhere.parent.mkdir()
    elsewhere.write_text("a tokenizer")
    borrowed = replace(checkpoint, tokenizer=elsewhere)
    base = identity_of(borrowed)
    checkpoint.files[0].write_text("yet another model")
    assert identity_of(borrowed) != base


@pytest.mark.parametrize(
    "flags",
    [{"max_batch_size": 1}, {"mp": 4}, {"step_timeout": 5.0}, {"output": Path("o.jsonl")}, {"device": "cpu"}],
)
def test_how_a_run_is_computed_does_not_change_it(checkpoint, flags):
    assert identity_of(checkpoint, **flags) == identity_of(checkpoint)


def test_a_copy_elsewhere_is_the_same_model(checkpoint, tmp_path):
    moved = tmp_path / "copy"
    moved.mkdir()
    files = [moved / file.name for file in (*checkpoint.files, checkpoint.tokenizer)]
    for file in files:
        file.write_text("something")
    copy = replace(checkpoint, path=moved, files=(files[0],), tokenizer=files[1], config=replace(CONFIG, name="copy"))
    assert identity_of(copy) == identity_of(checkpoint)


# ---- where answers go --------------------------------------------------------------------------------------------


def answer(id: str, text: str = "", error: str | None = None, **sampling) -> Answer:
    """An answer whose whole text is ready to be taken."""
    prompt = Prompt(id=id, text=f"prompt {id}", sampling=SamplingConfig(**sampling))
    request = Request(id=id, prompt=[1], sampling=prompt.sampling, finish_reason="error" if error else None)
    made = Answer(prompt, request, tokenizer=None, error=error)
    made.text = text
    return made


def end(answer: Answer) -> tuple[Answer, str]:
    answer.request.finish_reason = "stop"
    return answer, answer.text


def test_answers_are_printed_in_the_order_of_the_prompts(capsys):
    a, b, _, d = answers = [answer("a", " A\n"), answer("b", "B"), answer("c", error="too long"), answer("d", "D")]

    def stream():
        yield a, " A"
        yield end(d)
        yield end(b)
        assert capsys.readouterr().out == ""  # a is not finished: nothing can be said yet
        yield end(a)
        printed = "> prompt a\nA\n\n> prompt b\nB\n\n> prompt c\n[not answered: too long]\n\n> prompt d\nD\n\n"
        assert capsys.readouterr().out == printed

    print_in_order(answers, stream())
    assert all(made.is_finished for made in answers)


def test_a_finished_answer_does_not_wait_for_those_after_it(capsys):
    a, b = answers = [answer("a", "A"), answer("b", "B")]

    def stream():
        yield end(a)
        assert capsys.readouterr().out == "> prompt a\nA\n\n"
        yield b, "B"
        assert capsys.readouterr().out == ""
        yield end(b)

    print_in_order(answers, stream())
    assert capsys.readouterr().out == "> prompt b\nB\n\n"


def test_prompts_of_which_none_can_be_served_are_all_shown(capsys):
    print_in_order([answer("a", error="too long"), answer("b", error="empty")], iter(()))
    assert capsys.readouterr().out == "> prompt a\n[not answered: too long]\n\n> prompt b\n[not answered: empty]\n\n"


def test_one_answer_streams_and_ends_with_a_newline(capsys):
    made = answer("a", echo=True)

    def stream():
        assert capsys.readouterr().out == "prompt a"
        yield made, " is"
        assert capsys.readouterr().out == " is"
        yield made, " it"

    print_one(made, stream())
    assert capsys.readouterr().out == " it\n"


def test_finished_gives_each_answer_once():
    a, b, _ = answers = [answer("a"), answer("b"), answer("c", error="too long")]

    def stream():
        yield a, "x"
        yield end(b)
        yield a, "y"
        yield end(a)

    assert [made.request.id for made in finished(answers, stream())] == ["c", "b", "a"]


def test_an_output_holds_each_record_as_it_finishes(tmp_path):
    a, b, _ = answers = [answer("a", "A"), answer("b", "B"), answer("c", error="too long")]
    path = tmp_path / "out.jsonl"
    with Output(path, {}) as output:
        batch = Batch(answers=answers, num_prompts=3, num_blank=0, codec=None, output=output)

        def stream():
            assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == ["c"]
            yield end(b)
            yield a, "A"
            assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == ["c", "b"]
            yield end(a)

        batch.show(stream())
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(r["id"], r["completion"], r.get("error")) for r in records] == [
        ("c", "", "too long"),
        ("b", "B", None),
        ("a", "A", None),
    ]


# ---- in a job ----------------------------------------------------------------------------------------------------


@pytest.fixture
def job_flags(tiny, tmp_path) -> InferFlags:
    file = tmp_path / "prompts.txt"
    file.write_text("one\ntwo\n\nthree\nfour\nfive\n")
    return InferFlags(ckpt_dir=tiny, prompts_file=file, output=tmp_path / "out.jsonl")


def answer_all(flags: InferFlags) -> list[str]:
    """What is left to answer, after answering it."""
    with Batch.open(flags, locate(flags)) as batch:
        batch.show(end(answer) for answer in batch.answers)
        return [answer.request.id for answer in batch.answers]


def ids_in(path: Path) -> list[str]:
    return [json.loads(line)["id"] for line in path.read_bytes().splitlines()]


def test_tasks_of_an_array_answer_their_shares_of_the_prompts(job_flags, monkeypatch, capsys):
    monkeypatch.setenv("LLAMA_MP_ATTEMPT", "12_1-0")
    monkeypatch.setenv("LLAMA_MP_SHARE", "1/2")
    assert answer_all(job_flags) == ["1", "4"] and not job_flags.output.exists()
    assert answer_all(job_flags) == []
    assert "out.jsonl: 2 of 2 prompts are finished already" in capsys.readouterr().err
    monkeypatch.setenv("LLAMA_MP_SHARE", "0/2")
    monkeypatch.setenv("LLAMA_MP_ATTEMPT", "12_0-2")
    assert answer_all(job_flags) == ["0", "3", "5"]
    assert ids_in(job_flags.output) == ["0", "1", "3", "4", "5"]


def test_a_run_outside_of_the_job_is_the_same_run(job_flags, monkeypatch):
    monkeypatch.setenv("LLAMA_MP_ATTEMPT", "12_1-0")
    monkeypatch.setenv("LLAMA_MP_SHARE", "1/2")
    assert answer_all(job_flags) == ["1", "4"]
    monkeypatch.delenv("LLAMA_MP_ATTEMPT")
    assert answer_all(job_flags) == ["0", "3", "5"]
    assert ids_in(job_flags.output) == ["1", "4", "0", "3", "5"]


def test_a_task_for_which_no_prompt_is_left(tiny, monkeypatch, capsys):
    monkeypatch.setenv("LLAMA_MP_ATTEMPT", "12_3-0")
    monkeypatch.setenv("LLAMA_MP_SHARE", "3/4")
    flags = InferFlags(ckpt_dir=tiny)  # the three built-in prompts
    assert answer_all(flags) == []
    assert capsys.readouterr().out == ""
