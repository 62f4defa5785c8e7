"""LLM in a script: what it returns, and on how little that depends. One process here, several under torchrun."""

import json
from contextlib import closing
from itertools import islice
from pathlib import Path
from unittest.mock import patch

import pytest
from running import torchrun

from llama_mp import LLM, compiled, fused, kernels
from llama_mp.config import SamplingConfig
from llama_mp.errors import RequestError
from llama_mp.prompts import as_prompt
from llama_mp.runner import Runner

QUESTION, ANSWER = "What is the capital of France?", "The capital of France is Paris."
KEYS = ["id", "prompt", "completion", "tokens", "logprobs", "prompt_logprobs", "finish_reason"]
COUNTS = ["prompt_tokens", "completion_tokens"]
PROMPTS = ["Once upon a time", "The quick brown fox jumps over", "a", "Dogs"]
SAMPLED = {"temperature": 0.8, "max_gen_len": 12}


@pytest.fixture
def one_thread(monkeypatch):
    monkeypatch.setenv("LLAMA_MP_THREADS", "1")


def generated(tiny: Path, prompts=PROMPTS, *, max_batch_size: int = 8, **sampling) -> list[dict]:
    with LLM(tiny, max_batch_size=max_batch_size) as llm:
        return llm.generate(prompts, **SAMPLED | sampling)


def test_generate_gives_the_objects_of_the_contract(one_thread, tiny):
    for i, record in enumerate(generated(tiny, logprobs=True, prompt_logprobs=True)):
        assert list(record) == KEYS + COUNTS
        assert (record["id"], record["prompt"]) == (str(i), PROMPTS[i])
        assert record["finish_reason"] in ("stop", "length")
        assert len(record["tokens"]) == len(record["logprobs"]) == record["completion_tokens"] <= 12
        assert len(record["prompt_logprobs"]) == record["prompt_tokens"] - 1
        assert all(value <= 0 for value in record["logprobs"] + record["prompt_logprobs"])


def test_a_seed_gives_the_same_text_again_alone_or_in_a_batch(one_thread, tiny):
    together = generated(tiny)
    assert generated(tiny) == together
    assert generated(tiny, max_batch_size=1) == together
    assert generated(tiny, PROMPTS[:1]) == together[:1]
    assert [r["tokens"] for r in generated(tiny, seed=2)] != [r["tokens"] for r in together]


def test_stop_and_echo(one_thread, tiny):
    text = generated(tiny)[0]["completion"]
    stop = text[3:5]
    assert len(stop) == 2
    stopped, echoed = generated(tiny, PROMPTS[:1], stop=stop)[0], generated(tiny, PROMPTS[:1], echo=True)[0]
    assert stopped["completion"] == text[: text.index(stop)] and stopped["finish_reason"] == "stop"
    assert echoed["completion"] == PROMPTS[0] + text


def test_steps_ahead_of_the_text_change_no_record(one_thread, tiny, monkeypatch):
    """As on a GPU: rows that a stop text ends, others in their slots, and a stream that is given up in between."""
    whole = generated(tiny)
    few = {"max_batch_size": 2, "stop": (whole[0]["completion"][3:5], "e")}
    expected = generated(tiny, **few)
    assert {record["finish_reason"] for record in expected} == {"stop", "length"}
    monkeypatch.setattr(LLM, "depth", 2)
    monkeypatch.setattr(LLM, "records_graphs", False)
    assert generated(tiny, **few) == expected
    with LLM(tiny) as llm:
        for size in (1, 2):
            asked = [as_prompt(i, prompt, SamplingConfig(**SAMPLED)) for i, prompt in enumerate(PROMPTS)]
            with closing(llm.stream([llm.codec.answer(prompt, None) for prompt in asked])) as stream:
                list(islice(stream, 4 + size))
            assert llm.generate(PROMPTS, **SAMPLED) == whole


def test_one_model_serves_several_calls(one_thread):
    with LLM("smollm2-135m") as llm:
        for _ in range(2):
            chat = [{"role": "user", "content": QUESTION}]
            assert llm.generate([chat], temperature=0)[0]["completion"] == ANSWER
        with pytest.raises(RequestError, match=r"unknown field 'temprature' \(did you mean temperature\?\)"):
            llm.generate(["Hi"], temprature=0)
        with pytest.raises(RequestError, match="--top_p is 2"):
            llm.generate(["Hi"], top_p=2.0)
        assert llm.generate([""])[0]["finish_reason"] == "error"
        assert llm.generate([]) == []


def test_nothing_is_compiled_while_a_prompt_waits(one_thread, tiny):
    for cached in (compiled.load_library, kernels.load_kernels, kernels.load_many_rows, fused.load_steps):
        cached.cache_clear()
    with LLM(tiny) as llm, patch.object(compiled, "library_of", side_effect=AssertionError("too late")):
        assert llm.generate([" ".join(PROMPTS)], **SAMPLED)[0]["prompt_tokens"] > kernels.MAX_ROWS


def test_every_rank_gets_the_same_list(one_thread, tiny, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import json, os, sys\n"
        "from llama_mp import LLM\n"
        "with LLM(sys.argv[1]) as llm:\n"
        "    records = llm.generate(json.loads(sys.argv[2]), temperature=0.8, max_gen_len=12)\n"
        "with open(sys.argv[3] + os.environ['RANK'], 'w') as file:\n"
        "    json.dump(records, file)\n"
    )
    done = torchrun(2, script, tiny, json.dumps(PROMPTS), tmp_path / "records")
    assert done.code == 0, done.stderr
    first, second = (json.loads((tmp_path / f"records{rank}").read_text()) for rank in range(2))
    assert first == second == generated(tiny)


@pytest.mark.parametrize("messages", [[], [{"role": "user"}], ["hello"], [{"role": "user", "content": 3}]])
def test_malformed_messages_are_errors_of_their_own(one_thread, messages):
    with LLM("smollm2-135m") as llm:
        bad, good = llm.generate([messages, "Hi"], max_gen_len=1)
    assert bad["finish_reason"] == "error" and "messages" in bad["error"]
    assert good["finish_reason"] in ("stop", "length")


def test_prompts_are_a_list_of_texts_or_messages(one_thread, tiny):
    with LLM(tiny) as llm:
        with pytest.raises(RequestError, match="prompts is a str, but must be a list"):
            llm.generate("hello")
        with pytest.raises(RequestError, match=r"prompts\[1\] is a int"):
            llm.generate(["hello", 5])
    llm.close()  # a second time
    with pytest.raises(RequestError, match="this model is closed"):
        llm.generate(["hello"])


def test_arguments_are_checked_like_flags(one_thread):
    with pytest.raises(RequestError, match="no such folder"):
        LLM("/no/such/folder")
    with pytest.raises(RequestError, match="dtype is 'fp8', but must be one of"):
        LLM("smollm2-135m", dtype="fp8")


def test_a_cache_serves_again_until_it_is_too_small(one_thread, tiny, monkeypatch):
    """And with it what the runner has recorded; nothing of one answer is in the next."""
    closed = []
    monkeypatch.setattr(Runner, "close", lambda runner: closed.append(runner))
    with LLM(tiny) as llm:
        expected = llm.generate(PROMPTS, **SAMPLED)
        first = llm.runner
        assert llm.generate(PROMPTS, **SAMPLED) == expected
        assert llm.generate([PROMPTS[1], *PROMPTS[1:]], **SAMPLED)[1:] == expected[1:]
        assert llm.runner is first and not closed
        llm.generate(PROMPTS, **SAMPLED | {"max_gen_len": 20})
        second = llm.runner
        assert closed == [first] and second.cache.max_seq_len > first.cache.max_seq_len
        llm.generate(PROMPTS[:1], **SAMPLED)
        assert closed == [first, second]
        third = llm.runner
    assert closed == [first, second, third] and llm.runner is None
