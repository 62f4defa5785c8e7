"""Starting ranks: how many, with which arguments, and how their end becomes ours. No model: a script stands in."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from running import Done, Started, run, start

from llama_mp import errors
from llama_mp.errors import RequestError, RunError
from llama_mp.launcher import check_ranks, must_launch

# A verb of no more than this: `--do` says what each rank does, and which of them.
VERB = """
import json, os, signal, sys, time
from dataclasses import dataclass
from llama_mp import cli
from llama_mp.flags import Flags, flag
from llama_mp.errors import RequestError
from llama_mp.launcher import check_ranks, launch, must_launch

@dataclass(frozen=True, kw_only=True)
class Verb(Flags):
    do: str = flag("", "what")
    rank: str = flag("0", "who")
    mp: int = flag(2, "how many")
    text: tuple[str, ...] = flag((), "any")

def main(flags):
    ranks = check_ranks(flags.mp)
    if must_launch(ranks):
        return launch(ranks)
    rank = os.environ["RANK"]
    os.write(1, (json.dumps([int(rank), sys.argv[1:]]) + "\\n").encode())  # the line whole: both ranks write
    if flags.do == "refuse":
        raise RequestError("no such thing")
    if flags.do == "sleep":
        time.sleep(120)
    if flags.rank == rank and flags.do.startswith("exit"):
        os._exit(int(flags.do[4:]))
    if flags.rank == rank and flags.do.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, flags.do))
    time.sleep(0.5 if flags.do else 0)

cli.main(Verb, main, summary="A verb.")
"""


@pytest.fixture(scope="module")
def verb(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("a folder, $1 and 'quotes'") / "verb.py"
    file.write_text(VERB)
    return file


def launched(verb: Path, *flags: str) -> Done:
    done = run(sys.executable, verb, *flags, timeout=90)
    assert_quiet(done)
    return done


def assert_quiet(done: Done) -> None:
    """Nothing of torchrun's own on stderr: our one line at most."""
    lines = done.stderr.splitlines()
    assert len(lines) <= 1 and all(line.startswith("error: ") for line in lines), done.stderr


# ---- how many ranks ----------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_ranks_around(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def test_without_torchrun_the_flag_decides():
    assert [check_ranks(mp) for mp in (None, 1, 8)] == [1, 1, 8]
    assert [must_launch(ranks) for ranks in (1, 2)] == [False, True]


def test_under_torchrun_its_number_of_ranks_counts(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert check_ranks(None) == check_ranks(4) == 4
    assert not must_launch(4)
    with pytest.raises(RequestError, match="--mp 2, but torchrun started 4 ranks"):
        check_ranks(2)
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(RequestError, match="torchrun started 1"):
        check_ranks(2)


@pytest.mark.parametrize("mp", [0, -1])
def test_no_ranks_at_all_are_refused(mp):
    with pytest.raises(RequestError, match=f"--mp is {mp}"):
        check_ranks(mp)


# ---- what the ranks are told -------------------------------------------------------------------------------------

HOSTILE = ["a b", 'it\'s "quoted"', "two\nlines\n", "$HOME $$5 ${local_rank}", "--mp=3", "", "\\", "caf\u00e9 *"]


def test_arguments_arrive_unchanged_at_every_rank(verb, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    arguments = [f"--text={text}" for text in HOSTILE]
    done = launched(verb, *arguments)
    assert done.code == 0
    assert sorted(map(json.loads, done.stdout.splitlines())) == [[0, arguments], [1, arguments]]
    assert list(tmp_path.iterdir()) == []  # torchrun left nothing


# ---- how they end ------------------------------------------------------------------------------------------------


def test_a_wrong_request_is_one_line_and_exit_code_2(verb):
    done = launched(verb, "--do", "refuse")
    assert (done.code, done.error) == (2, "no such thing")


@pytest.mark.parametrize(("exit_code", "code"), [("1", 1), ("7", 1)])
def test_any_other_code_of_a_rank_is_a_failed_run(verb, exit_code, code):
    done = launched(verb, "--do", f"exit{exit_code}", "--rank", "1")
    assert done.code == code


@pytest.mark.parametrize(("rank", "name"), [("1", "SIGKILL"), ("0", "SIGSEGV")])
def test_a_rank_killed_by_a_signal_is_named(verb, rank, name):
    done = launched(verb, "--do", name, "--rank", rank)
    assert done.code == 1
    assert done.error.startswith(f"rank {rank} was killed by {name}")
    assert ("out of memory" in done.error) == (name == "SIGKILL")


def until_ranks_run(started: Started) -> None:
    for _ in range(2):  # each rank prints a line as it begins
        assert json.loads(started.process.stdout.readline())[1]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_the_launcher_ends_the_ranks(verb, number, code):
    started = start(sys.executable, verb, "--do", "sleep")
    until_ranks_run(started)
    assert len(started.living()) == 3
    before = time.monotonic()
    os.kill(started.process.pid, number)
    done = started.wait(timeout=60)
    assert done.code == code
    assert started.living() == []
    assert done.stderr == "" and done.stdout == ""
    assert time.monotonic() - before < 30  # torchrun kills only after 30 s what does not end by itself


def test_a_rank_of_a_job_is_named_once(monkeypatch, capsys):
    for name, value in {"LLAMA_MP_NODES": "n1,n2", "SLURMD_NODENAME": "n2", "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(errors, "_may_speak", lambda: True)
    for text in ("rank 0 on n1 died", "the disk is full"):
        errors.report(RunError(text))
    told = ["rank 0 on n1 died", "rank 1 on n2: the disk is full"]
    assert capsys.readouterr().err.splitlines() == [f"error: {line}" for line in told]
