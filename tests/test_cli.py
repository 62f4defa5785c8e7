"""The command line: what is refused, in which words; what the values become; help; exit codes; who speaks."""

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from llama_mp import cli, errors
from llama_mp.config import RunConfig, SamplingConfig
from llama_mp.errors import RequestError, RunError
from llama_mp.flags import REQUIRED, check_at_least, flag

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True, kw_only=True)
class CookConfig:
    """A base class with every type."""

    heat: float = flag(0.5, "0 is cold")
    rounds: int = flag(3, "how often to stir")
    style: Literal["plain", "spicy"] = flag("plain", "what it tastes of")
    echo: bool = flag(False, "say it again")

    def __post_init__(self) -> None:
        check_at_least(self, heat=0, rounds=1)


@dataclass(frozen=True, kw_only=True)
class DishFlags(CookConfig):
    """A verb's own flags."""

    prompt: str | None = flag(None, "a text")
    book: Path | None = flag(None, "where the recipes are")
    stop: tuple[str, ...] = flag((), "end at this text")
    max_len: int | None = flag(None, "how long at most")


@dataclass(frozen=True, kw_only=True)
class CopyFlags:
    """A required flag."""

    output: Path = field(metadata={"help": "the folder to write"})


@dataclass(frozen=True, kw_only=True)
class CheckFlags:
    """An argument that needs no flag, and one that is optional."""

    path: Path = flag(REQUIRED, "the folder to check", positional=True)
    other_path: Path | None = flag(None, "the folder to compare with", positional=True)
    quick: bool = flag(False, "look at the sizes alone")


@dataclass(frozen=True, kw_only=True)
class InferFlags(RunConfig, SamplingConfig):
    """The project's own classes, put together as a launch file does."""

    prompt: str | None = flag(None, "text to continue")


def dish(*argv: str) -> DishFlags:
    return cli.parse(DishFlags, argv)


def refusal(*argv: str, flags_class: type = DishFlags) -> str:
    with pytest.raises(RequestError) as refused:
        cli.parse(flags_class, argv)
    assert "\n" not in str(refused.value)
    return str(refused.value)


# --- values


@pytest.mark.parametrize(
    "text",
    [
        "",
        "- milk",
        "# no",
        "a\nb",
        "123",
        "[1,2]",
        "True",
        "None",
        "1e3",
        "'q'",
        "{1:2}",
        "a=b",
        "-",
        "-1",
        "-x",
        "é🦙",
    ],
)
def test_text_stays_text(text: str) -> None:
    assert dish("--prompt", text).prompt == text
    assert dish(f"--prompt={text}").prompt == text
    assert dish("--stop", text, f"--stop={text}").stop == (text, text)


VALUES = {
    "": {},
    "--max_len 7 --rounds=+12 --heat 1 --style spicy": {"max_len": 7, "rounds": 12, "heat": 1.0, "style": "spicy"},
    "--max-len 7 --heat=1e-3 --echo": {"max_len": 7, "heat": 0.001, "echo": True},
    "--max-len=7 --echo --rounds 2": {"max_len": 7, "echo": True, "rounds": 2},
    "--echo True --book 'a b/c'": {"echo": True, "book": Path("a b/c")},
    "--echo=true --book=~/c": {"echo": True, "book": Path.home() / "c"},
    "--echo false --stop a": {"stop": ("a",)},
    "--stop a --echo=false --stop=b,c --stop a": {"stop": ("a", "b,c", "a")},
    "--prompt=--x --stop=--": {"prompt": "--x", "stop": ("--",)},
    "--prompt=--help": {"prompt": "--help"},
}


@pytest.mark.parametrize("line", VALUES)
def test_values_have_the_declared_type(line: str) -> None:
    assert repr(dish(*shlex.split(line))) == repr(DishFlags(**VALUES[line]))  # repr tells 1, 1.0 and True apart


def test_parsing_prints_nothing_and_leaves_the_class_alone(capfd: pytest.CaptureFixture[str]) -> None:
    before = set(vars(DishFlags))
    dish("--prompt", "hello", "--rounds", "2")
    assert capfd.readouterr() == ("", "")
    assert set(vars(DishFlags)) == before


def test_the_projects_own_classes_parse() -> None:
    flags = cli.parse(InferFlags, ["--prompt", "1", "--dtype", "bf16", "--max-gen-len", "5", "--ckpt_dir", "x"])
    assert flags == InferFlags(prompt="1", dtype="bf16", max_gen_len=5, ckpt_dir=Path("x"))


# --- refusals

DISH_FLAGS = "flags: --prompt, --book, --stop, --max_len, --heat, --rounds, --style, --echo, --help"
FOLLOWS = "a value follows its flag, as in --name value"
REFUSALS = {
    "--promt x": f"unknown flag --promt (did you mean --prompt?); {DISH_FLAGS}",
    "--max-lem=3": f"unknown flag --max-lem (did you mean --max_len?); {DISH_FLAGS}",
    "--zzz": f"unknown flag --zzz; {DISH_FLAGS}",
    "--hepl": f"unknown flag --hepl (did you mean --help?); {DISH_FLAGS}",
    "--noecho": f"unknown flag --noecho (did you mean --echo=false?); {DISH_FLAGS}",
    "--no-echo": f"unknown flag --no-echo (did you mean --echo=false?); {DISH_FLAGS}",
    "--rounds ten": "--rounds is 'ten', but must be a whole number",
    "--rounds 1.5": "--rounds is '1.5', but must be a whole number",
    "--rounds 1_000": "--rounds is '1_000', but must be a whole number",
    "--rounds=": "--rounds is '', but must be a whole number",
    "--heat hot": "--heat is 'hot', but must be a finite number",
    "--heat nan": "--heat is 'nan', but must be a finite number",
    "--heat -inf": "--heat is '-inf', but must be a finite number",
    "--heat 1e999": "--heat is '1e999', but must be a finite number",
    "--echo yes": "--echo is 'yes', but must be true or false",
    "--echo=1": "--echo is '1', but must be true or false",
    "--book=": "--book is '', but must be a path",
    "--prompt \udcff": "--prompt is '\\udcff', but must be text in UTF-8",
    "--style Spicey": "--style is 'Spicey', but must be one of plain, spicy (did you mean spicy?)",
    "--style x": "--style is 'x', but must be one of plain, spicy",
    "--prompt": "--prompt has no value; write --prompt TEXT",
    "--prompt --echo": "--prompt has no value: --echo follows; write --prompt TEXT, "
    "or --prompt=--x for a value that begins with --",
    "--rounds 1 --rounds=2": "--rounds is given twice: '1' and '2'; keep one",
    "--max_len 1 --max-len 1": "--max_len is given twice: '1' and '1'; keep one",
    "--echo --echo": "--echo is given twice: 'true' and 'true'; keep one",
    "--prompt hello world": f"unexpected argument 'world': {FOLLOWS}; quote one with spaces",
    "-5": f"unexpected argument '-5': {FOLLOWS}; quote one with spaces",
    "-p x": "unknown option '-p': flags begin with two dashes, --help lists them",
    "-prompt=x": "unknown option '-prompt=x': flags begin with two dashes, --help lists them",
    "--echo -- --trace": "'--' is not accepted here: every value follows its flag, as in --name value",
    "--heat -1": "--heat is -1.0, but must be at least 0",  # the class's own check
    "--rounds=-1": "--rounds is -1, but must be at least 1",
}


@pytest.mark.parametrize("line", REFUSALS)
def test_refusal(line: str) -> None:
    assert refusal(*shlex.split(line)) == REFUSALS[line]


def test_a_missing_required_flag() -> None:
    assert refusal(flags_class=CopyFlags) == "--output PATH is missing: the folder to write"
    assert cli.parse(CopyFlags, ["--output", "x"]) == CopyFlags(output=Path("x"))


POSITIONAL = {
    "a": {"path": Path("a")},
    "a=b/=c": {"path": Path("a=b/=c")},
    "'a b' --quick c": {"path": Path("a b"), "quick": True, "other_path": Path("c")},
    "--quick a c": {"path": Path("a"), "quick": True, "other_path": Path("c")},
    "--quick false a": {"path": Path("a")},
    "--quick=true ~/a": {"path": Path.home() / "a", "quick": True},
    "--path a": {"path": Path("a")},
    "--path=-a c": {"path": Path("-a"), "other_path": Path("c")},
    "--other-path c a": {"path": Path("a"), "other_path": Path("c")},
}


@pytest.mark.parametrize("line", POSITIONAL)
def test_an_argument_without_its_flag(line: str) -> None:
    assert cli.parse(CheckFlags, shlex.split(line)) == CheckFlags(**POSITIONAL[line])


POSITIONAL_REFUSALS = {
    "": "PATH is missing: the folder to check",
    "--quick": "PATH is missing: the folder to check",
    "''": "PATH is '', but must be a path",
    "a b c": "unexpected argument 'c': PATH is 'a' and OTHER_PATH is 'b'; quote a text with spaces",
    "a --path b": "PATH is given twice: 'a' and 'b'; keep one",
    "--path a --path b": "PATH is given twice: 'a' and 'b'; keep one",
    "--path": "PATH has no value; write --path PATH",
    "--path --quick": "PATH has no value: --quick follows; write --path PATH, "
    "or --path=--x for a value that begins with --",
    "-a": "unknown option '-a': flags begin with two dashes, --help lists them",
    "a --quik": "unknown flag --quik (did you mean --quick?); flags: --path, --other_path, --quick, --help",
    "a --quick=b": "--quick is 'b', but must be true or false",
}


@pytest.mark.parametrize("line", POSITIONAL_REFUSALS)
def test_refusal_of_an_argument_without_its_flag(line: str) -> None:
    assert refusal(*shlex.split(line), flags_class=CheckFlags) == POSITIONAL_REFUSALS[line]


@pytest.mark.parametrize("head", [["--rounds", "x"], ["--rounds", "9"], ["--x"], ["--rounds=x"], ["x"]])
def test_a_refusal_stays_short(head: list[str]) -> None:
    assert len(refusal(*head[:-1], head[-1] + head[-1][-1] * 5000)) < 250


def test_the_contracts_own_example() -> None:
    unknown = refusal("--temprature", "0.1", flags_class=InferFlags)
    assert unknown.startswith("unknown flag --temprature (did you mean --temperature?); flags: --prompt, --size, ")


# --- help

DISH_HELP = """\
usage: python cook.py [--name value ...]

Cook a dish.

    python cook.py --prompt soup

dish flags:
  --prompt TEXT        a text
  --book PATH          where the recipes are
  --stop TEXT          end at this text
  --max_len INT        how long at most

cook flags:
  --heat NUMBER        0 is cold (default: 0.5)
  --rounds INT         how often to stir (default: 3)
  --style plain|spicy  what it tastes of (default: plain)
  --echo [true|false]  say it again (default: false)

  -h, --help           print this text"""


def test_help_whole() -> None:
    assert cli.usage(DishFlags, "python cook.py", "Cook a dish.\n\n    python cook.py --prompt soup\n") == DISH_HELP


def test_help_shows_what_is_required() -> None:
    text = cli.usage(CopyFlags, "copy.py", "Copy.")
    assert text.startswith("usage: copy.py --output PATH [--name value ...]\n")
    assert "  --output PATH  the folder to write (required)\n" in text


def test_help_shows_arguments_without_a_flag() -> None:
    text = cli.usage(CheckFlags, "check.py", "Check.")
    assert text.startswith("usage: check.py PATH [OTHER_PATH] [--name value ...]\n")
    assert "  PATH                  the folder to check (required)\n" in text


def test_help_of_the_projects_classes_fits_and_is_complete() -> None:
    text = cli.usage(InferFlags, "infer.py", "word " * 100)
    assert max(map(len, text.splitlines())) <= cli.HELP_WIDTH
    assert all(f"  --{name} " in text for name in cli.describe(InferFlags))
    order = [text.index(f"{group} flags:") for group in ("infer", "run", "sampling")]
    assert order == sorted(order)


def test_a_wide_form_stands_on_its_own_line() -> None:
    lines = cli.entry("--style " + "x" * 40, "what it tastes of", 20).splitlines()
    assert lines == ["  --style " + "x" * 40, " " * 24 + "what it tastes of"]


# --- main, in this process


def outcome(verb: Callable[[Any], Any], *argv: str) -> Any:
    with pytest.raises(SystemExit) as left:
        cli.main(DishFlags, verb, argv=argv, summary="Cook.")
    return left.value.code


def failing(error: BaseException) -> Callable[[Any], None]:
    def verb(flags: Any) -> None:
        raise error

    return verb


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LLAMA_MP_DEBUG"):
        monkeypatch.delenv(name, raising=False)


UNEXPECTED = "set LLAMA_MP_DEBUG=1 for the traceback, and please report it"
FAILURES = [
    (RequestError("no such\ndish"), 2, "error: no such dish\n"),
    (RunError("burnt"), 1, "error: burnt\n"),
    (KeyboardInterrupt(), 130, ""),
    (SystemExit(7), 7, ""),
    (SystemExit("bye"), "bye", ""),  # the interpreter prints it
    (
        FileNotFoundError(2, "No such file", "x.txt"),
        2,
        "error: x.txt: No such file; check the path and who may read it\n",
    ),
    (ZeroDivisionError("by 0"), 1, f"error: unexpected ZeroDivisionError: by 0; {UNEXPECTED}\n"),
    (BrokenPipeError("not stdout"), 1, f"error: unexpected BrokenPipeError: not stdout; {UNEXPECTED}\n"),
]


@pytest.mark.parametrize(("error", "code", "stderr"), FAILURES)
def test_failures(error: BaseException, code: Any, stderr: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert outcome(failing(error)) == code
    assert capfd.readouterr() == ("", stderr)


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (1, 1)])
def test_the_verb_gets_the_flags_and_decides_the_code(
    returned: int | None, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def verb(flags: DishFlags) -> int | None:
        print(flags.prompt)
        return returned

    assert outcome(verb, "--prompt", "12") == code
    assert capsys.readouterr() == ("12\n", "")


def test_argv_is_the_processs_own_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["cook.py", "--zzz"])
    with pytest.raises(SystemExit) as left:
        cli.main(DishFlags, failing(AssertionError()), summary="Cook.")
    assert left.value.code == 2


@pytest.mark.parametrize("line", ["-h", "--help", "--zzz --help", "--prompt -h", "x -h --rounds=t"])
def test_help_anywhere(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome(failing(AssertionError()), *line.split()) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("usage: python ") and "\nCook.\n" in captured.out and captured.err == ""


def test_debug_adds_the_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("LLAMA_MP_DEBUG", "1")
    assert outcome(failing(RunError("burnt"))) == 1
    lines = capsys.readouterr().err.splitlines()
    assert "Traceback (most recent call last):" in lines
    assert [line for line in lines if line.startswith("error: ")] == ["error: burnt"]


@pytest.mark.parametrize("rank", [None, 0, 1])
@pytest.mark.parametrize(
    ("argv", "error", "code"),
    [(["--zzz"], None, 2), ([], RunError("burnt"), 1), ([], KeyboardInterrupt(), 130), (["--help"], None, 0)],
)
def test_ranks_above_0_are_silent_and_fail_late(
    rank: int | None,
    argv: list[str],
    error: Any,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    naps: list[float] = []
    monkeypatch.setattr(errors.time, "sleep", naps.append)
    if rank is not None:
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
    assert outcome(failing(error), *argv) == code
    assert naps == ([errors.SPEAK_GRACE_S] if rank == 1 and code in (1, 2) else [])
    captured = capsys.readouterr()
    if rank == 1 and code in (1, 2):  # not ended in that time: no other rank has spoken
        assert captured.err.startswith("error: rank 1: ")
    else:
        assert any(captured) == (rank != 1 and code != 130)


# --- main, in a process of its own

SCRIPT = '''\
"""Speak."""

import sys
from dataclasses import dataclass

from llama_mp import cli
from llama_mp.flags import flag

@dataclass(frozen=True, kw_only=True)
class SpeakFlags:
    lines: int = flag(1, "how many lines to print")
    text: str = flag("line", "what they say")

def speak(flags: SpeakFlags) -> None:
    for _ in range(flags.lines):
        print(flags.text)
    assert "torch" not in sys.modules

cli.main(SpeakFlags, speak, summary=__doc__)
'''


@pytest.fixture
def script(tmp_path: Path) -> list[str]:
    path = tmp_path / "speak it.py"
    path.write_text(SCRIPT)
    return [sys.executable, str(path)]


def start(command: list[str], **more: Any) -> subprocess.CompletedProcess[bytes]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **more.pop("env", {})}
    return subprocess.run(command, env=env, timeout=30, check=False, stderr=subprocess.PIPE, **more)


@pytest.mark.parametrize(("line", "code"), [("--help", 0), ("--txt x", 2), ("--text x", 0)])
def test_answers_without_torch_in_under_a_second(script: list[str], line: str, code: int) -> None:
    seconds = []
    for _ in range(2):  # the better of two: the machine may be busy
        start_s = time.monotonic()
        assert start([*script, *line.split()], stdout=subprocess.PIPE).returncode == code
        seconds.append(time.monotonic() - start_s)
    assert min(seconds) < 1


def test_cli_imports_no_torch() -> None:
    done = start([sys.executable, "-c", "import sys, llama_mp.cli; sys.exit('torch' in sys.modules)"])
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("lines", ["1", "100000"])  # one line: only the last flush finds out
def test_the_reader_leaves_early(script: list[str], lines: str, unbuffered: str) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = start([*script, "--lines", lines], stdout=write_end, env={"PYTHONUNBUFFERED": unbuffered})
    os.close(write_end)
    assert (done.returncode, done.stderr) == (1, b"")


def test_in_a_shell_pipe(script: list[str]) -> None:
    pipe = 'set -o pipefail; "$0" "$1" --lines 100000 | head -1'
    done = start(["bash", "-c", pipe, *script], stdout=subprocess.PIPE)
    assert (done.returncode, done.stdout, done.stderr) == (1, b"line\n", b"")


def test_a_full_disk_is_one_error_line(script: list[str]) -> None:
    with open("/dev/full", "wb") as full:
        done = start(script, stdout=full)
    assert done.returncode == 1
    assert done.stderr.count(b"\n") == 1
    assert done.stderr.startswith(b"error: standard output: No space left on device; ")


def test_closed_stdout(script: list[str]) -> None:
    done = start(["bash", "-c", '"$0" "$1" >&-', *script])
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("env", [{"LC_ALL": "C"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}])
def test_a_c_locale_prints_emoji(script: list[str], env: dict[str, str]) -> None:
    code = SCRIPT.replace("print(flags.text)", 'print("\\N{LLAMA} \\udcff")')
    Path(script[1]).write_text(code)
    done = start(script, env=env, stdout=subprocess.PIPE)
    assert (done.returncode, done.stdout) == (0, "🦙 ?\n".encode()), done.stderr


def test_who_is_abandoned_leaves_without_tearing_down() -> None:
    code = (
        "import atexit, sys; from llama_mp import errors; atexit.register(print, 'torn down'); "
        "print('said'); {} errors.leave(5)"
    )
    for before, expected in (("", "said\ntorn down\n"), ("errors.abandon();", "said\n")):
        done = subprocess.run([sys.executable, "-c", code.format(before)], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout, done.stderr) == (5, expected, "")
