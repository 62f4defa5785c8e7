"""Lines, Ctrl-C and the terminal's settings, at a pseudo-terminal."""

import os
import signal
import sys
import time

import pytest
from running import ROOT, Talk, marked, run

# Repeats lines; "listen" listens until Ctrl-C, as while an answer is written.
SCRIPT = """
import sys, time
sys.path.insert(0, sys.argv[1])
from llama_mp.terminal import Terminal
with Terminal() as terminal:
    while (line := terminal.ask("> ")) is not None:
        print("said", repr(line), flush=True)
        if line == "fail":
            raise ValueError("told to")
        if line == "listen":
            with terminal.listening() as interrupted:
                print("listening", flush=True)
                while not interrupted():
                    time.sleep(0.01)
            print("stopped", flush=True)
"""
COMMAND = (sys.executable, "-c", SCRIPT, str(ROOT))


@pytest.fixture
def talk():
    with Talk(*COMMAND) as talk:
        talk.expect("> ")
        yield talk


def test_lines_until_ctrl_d(talk):
    talk.type("hello\r")
    talk.expect("said 'hello'")
    talk.expect("> ")
    talk.type("\x1b[A!\r")  # arrow up: history
    talk.expect("said 'hello!'")
    talk.expect("> ")
    talk.type("\x04")
    assert talk.end() == 0


def test_ctrl_c_empties_the_line(talk):
    talk.type("wrong")
    talk.expect("wrong")
    talk.type("\x03right\r")
    talk.expect("said 'right'")
    talk.expect("> ")
    talk.type("\x04")
    assert talk.end() == 0


def test_ctrl_c_stops_listening_and_what_was_typed_since_is_kept(talk):
    talk.type("listen\r")
    talk.expect("listening")
    talk.type("dropped\x03kept")
    talk.expect("stopped")
    talk.expect("kept")  # shown at the next prompt
    talk.type(" too\r")
    talk.expect("said 'kept too'")
    talk.expect("> ")
    talk.type("\x04")
    assert talk.end() == 0


def test_an_error_restores_the_terminal(talk):
    talk.type("fail\r")
    talk.expect("ValueError: told to")
    assert talk.end() == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGQUIT])
@pytest.mark.parametrize("listening", [False, True])
def test_a_signal_restores_the_terminal(talk, listening, number):
    if listening:
        talk.type("listen\r")
        talk.expect("listening")
    (pid,) = set(marked(talk.mark)) - {talk.process.pid}
    deadline = time.monotonic() + 30
    while pid in marked(talk.mark) and time.monotonic() < deadline:
        os.kill(pid, number)  # readline shows its prompt a moment before it waits: a signal just then is seen late
        time.sleep(0.5)
    assert talk.end() == 128 + number


def test_a_pipe_gives_lines_and_no_prompt_is_shown():
    done = run(*COMMAND, text="a\n\nb é\nlast")
    assert (done.code, done.stdout) == (0, "said 'a'\nsaid ''\nsaid 'b é'\nsaid 'last'\n")


def test_bytes_that_are_no_utf_8_end_nothing():
    done = run("sh", "-c", 'printf "a\\377\\n" | "$@"', "sh", *COMMAND)
    assert (done.code, done.stdout) == (0, "said 'a\ufffd'\n")


def test_a_closed_standard_input_is_its_end():
    done = run("sh", "-c", '"$@" <&-', "sh", *COMMAND)
    assert (done.code, done.stdout, done.stderr) == (0, "", "")
