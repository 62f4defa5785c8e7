"""The conversation from end to end, at a pseudo-terminal and through a pipe."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
from running import CHAT, ROOT, Done, Talk, environment_of, marked, run

COMMAND = (sys.executable, CHAT, "--temperature", "0")
QUESTION, ANSWER = "What is the capital of France?", "The capital of France is Paris."
STORY = "Tell me a long story"


def chat(*flags: str | Path, text: str, **env: str) -> Done:
    return run(*COMMAND, *flags, text=text, **env)


def begin_answer(talk: Talk) -> None:
    """Wait for the first words of an answer, whatever they are."""
    for _ in range(3):
        talk.expect(" ")


@pytest.mark.parametrize("mp", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_a_conversation_at_the_terminal(mp, tmp_path):
    with Talk(*COMMAND, "--mp", mp) as talk:
        for keys, shown in [
            (f"{STORY}\r", "\n"),
            ("\x03", "\n"),
            (f"/save {tmp_path}/stopped\r", "1 turn saved"),
            (f"{QUESTION}\r", "France"),  # the answer hangs on the half of a story before it
            ("/reset\r", "forgotten"),
            (f"{QUESTION}\r", ANSWER),
            (f"/save {tmp_path}/whole\r", "1 turn saved"),
            (f"/load {tmp_path}/stopped\r", "1 turn loaded"),
            ("/quit\r", "peak memory"),
        ]:
            if keys == "\x03":
                begin_answer(talk)
                talk.type(keys)
            else:
                talk.expect("> ")
                talk.type(keys)
                talk.expect(keys.strip())  # the echo
            talk.expect(shown)
        assert talk.end() == 0
    question, story = json.loads((tmp_path / "stopped").read_text())
    assert question == {"role": "user", "content": STORY}
    assert 0 < len(story["content"]) < 1500  # whole, it has thousands
    whole = json.loads((tmp_path / "whole").read_text())
    assert [message["content"] for message in whole] == [QUESTION, ANSWER]


def test_the_terminal_is_restored_when_rank_0_is_killed_in_an_answer():
    with Talk(*COMMAND, "--mp", "2") as talk:
        talk.expect("> ")
        talk.type(f"{STORY}\r")
        talk.expect(STORY)
        begin_answer(talk)
        (leader,) = (pid for pid in marked(talk.mark) if b"RANK=0" in environment_of(Path(f"/proc/{pid}")))
        os.kill(leader, signal.SIGKILL)
        talk.expect("error: rank 0 was killed by SIGKILL")
        assert talk.end() == 1


def test_a_pipe_is_a_conversation_too():
    done = chat(text=f"{QUESTION}\n/qiut\n\n/save\n/load /absent\n/help\nAnd of Italy?\n/quit\n{QUESTION}\n")
    assert (done.code, done.stdout) == (0, f"{ANSWER}\nThe capital of Italy is Rome.\n")
    unknown, no_file, absent, *commands, summary = done.stderr.splitlines()
    assert unknown.startswith("unknown command /qiut (did you mean /quit?); commands: /reset, ")
    assert no_file == "/save needs a file: /save FILE"
    assert absent == "/absent cannot be read: No such file or directory"
    assert any(line.startswith("/reset ") for line in commands)
    assert summary.startswith("loaded ") and "tokens/s" in summary


def test_what_does_not_fit_is_dropped_or_refused_and_said():
    flags = ("--max_seq_len", "64", "--max_gen_len", "16", "--system", "Be brief.")
    done = chat(*flags, text=f"{QUESTION}\n{QUESTION}\n{'word ' * 60}\n{QUESTION}\n")
    assert (done.code, done.stdout) == (0, f"{ANSWER}\n" * 3)
    dropped, too_long, again, _ = done.stderr.splitlines()
    assert dropped == again == "the context is full: the oldest 1 turn dropped"
    assert "tokens with the system message, and 48 fit: shorten it" in too_long


@pytest.mark.parametrize("mp", ["1", "2"])
def test_what_cannot_hold_a_conversation_is_refused_without_torch(tiny, tmp_path, mp):
    (tmp_path / "torch.py").write_text("import os\nos._exit(99)\n")
    no_torch = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    assert "base model" in chat("--ckpt_dir", tiny, "--mp", mp, text="Hi\n", **no_torch).refusal
    long = chat("--max_seq_len", "30", "--system", "word " * 50, "--mp", mp, text="Hi\n", **no_torch)
    assert "with the system message, and 15 fit" in long.refusal
    assert "unknown flag --echo" in chat("--echo", text="", **no_torch).refusal
