"""The one strict wrapper around fire: a verb's flags are a frozen dataclass, and nothing else is accepted.

`main` is all that a launch file calls. Every token is checked here, because fire alone runs a job that has a
misspelt flag, takes `--prompt 123` for a number and `--echo=false` for a true text. What is left to fire is its
own work, to build an object from a command; each value goes through the reader of its field's declared type.
"""

import contextlib
import inspect
import itertools
import json
import math
import os
import re
import sys
import textwrap
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

import fire

from llama_mp.errors import (
    DONE,
    RUN_FAILED,
    RequestError,
    did_you_mean,
    leave,
    log_as_json,
    rank_zero_speaks,
    report,
)
from llama_mp.stdout import drop_unwritable_output, is_broken_stdout, naming_stdout

HELP_WIDTH = 100  # columns
WIDEST_FORM = 36  # columns of `--name TYPE` in the help; a wider one stands on a line of its own
LONGEST_QUOTE = 60  # characters of a wrong value that an error repeats
SWITCH = ("false", "true")

Flags = TypeVar("Flags")


class Kind(NamedTuple):
    """How the text of one value becomes a value: `read` raises ValueError on anything but `wanted`."""

    read: Callable[[str], Any]
    placeholder: str
    wanted: str
    choices: tuple[str, ...] = ()


class Flag(NamedTuple):
    """One field of a flags class, as the command line sees it."""

    name: str
    kind: Kind
    repeats: bool
    default: Any  # MISSING: the flag is required
    help: str
    group: str
    positional: bool = False
    bare: str | None = None  # the value's text when none is given; None: one must be

    @property
    def label(self) -> str:
        """What errors call it."""
        return self.name.upper() if self.positional else f"--{self.name}"

    @property
    def form(self) -> str:
        value = self.kind.placeholder if self.bare is None else f"[{self.kind.placeholder}]"
        return self.label if self.positional else f"{self.label} {value}"

    def read(self, text: str) -> Any:
        """The value of the one text that `parse` hands over through fire: a JSON list where the flag repeats."""
        return tuple(map(self.read_one, json.loads(text))) if self.repeats else self.read_one(text)

    def read_one(self, text: str) -> Any:
        try:
            return self.kind.read(text)
        except ValueError:
            near = did_you_mean(text, self.kind.choices)
            raise RequestError(f"{self.label} is {quote(text)}, but must be {self.kind.wanted}{near}") from None


def read_text(text: str) -> str:
    text.encode("utf-8")  # bytes that are not UTF-8 arrive as lone surrogates: UnicodeEncodeError is a ValueError
    return text


def read_whole(text: str) -> int:
    if not re.fullmatch(r"[+-]?[0-9]+", text):  # int() also takes 1_000 and blanks
        raise ValueError(text)
    return int(text)


def read_number(text: str) -> float:
    value = float(text)
    if "_" in text or not math.isfinite(value):
        raise ValueError(text)
    return value


def read_switch(text: str) -> bool:
    return bool(SWITCH.index(text.lower()))


def read_path(text: str) -> Path:
    if not text:  # an unset shell variable: Path("") would be the current folder
        raise ValueError(text)
    return Path(os.path.expanduser(text))  # the shell leaves the ~ of --ckpt_dir=~/llama to us


KINDS: dict[Any, Kind] = {
    str: Kind(read_text, "TEXT", "text in UTF-8"),
    int: Kind(read_whole, "INT", "a whole number"),
    float: Kind(read_number, "NUMBER", "a finite number"),
    bool: Kind(read_switch, "[true|false]", "true or false"),
    Path: Kind(read_path, "PATH", "a path"),
}


def describe(flags_class: type) -> dict[str, Flag]:
    """The flags of a dataclass by name: those of the class itself first, then its bases' in their order."""
    hints = get_type_hints(flags_class)
    flags: dict[str, Flag] = {}
    for owner in flags_class.__mro__:
        group = re.sub("(Config|Flags)$", "", owner.__name__).lower()
        own = inspect.get_annotations(owner)
        for f in fields(flags_class):
            if f.name in own and f.name not in flags:
                kind, repeats = kind_of(hints[f.name])
                flags[f.name] = Flag(f.name, kind, repeats, f.default, group=group, **f.metadata)
    return flags


def kind_of(hint: Any) -> tuple[Kind, bool]:
    """The kind of a value of type `hint`, and whether its flag repeats.

    `hint` is a key of KINDS, a Literal, `X | None` or `tuple[X, ...]` of these.
    """
    if get_origin(hint) in (Union, UnionType):
        (hint,) = (part for part in get_args(hint) if part is not NoneType)
    if get_origin(hint) is tuple:
        return kind_of(get_args(hint)[0])[0], True
    if get_origin(hint) is Literal:
        values = get_args(hint)
        choices = tuple(str(value) for value in values)
        wanted = f"one of {', '.join(choices)}"
        return Kind(lambda text: values[choices.index(text)], "|".join(choices), wanted, choices), False
    assert hint in KINDS, f"no reader for flags of type {hint}"
    return KINDS[hint], False


def parse(flags_class: type[Flags], argv: Sequence[str]) -> Flags:
    """The object that `argv` (without the program's name) asks for; RequestError on anything not understood."""
    flags = describe(flags_class)
    given = collect(flags, argv)
    for flag in flags.values():
        if flag.default is MISSING and flag.name not in given:
            raise RequestError(f"{flag.form} is missing: {flag.help}")

    @fire.decorators.SetParseFns(**{name: flag.read for name, flag in flags.items()})
    def build(**values: Any) -> Flags:
        return flags_class(**values)

    # One --name=value token per flag leaves fire nothing to guess; a flag that repeats travels as a JSON list.
    command = [f"--{name}={json.dumps(texts) if flags[name].repeats else texts[0]}" for name, texts in given.items()]
    return fire.Fire(build, command=command, serialize=lambda built: None)  # fire prints what serialize returns


def collect(flags: dict[str, Flag], argv: Sequence[str]) -> dict[str, list[str]]:
    """The texts given for each flag, in order; RequestError for tokens that are no flag of ours or lack a value."""
    given: dict[str, list[str]] = {}
    tokens = deque(argv)
    places = [flag for flag in flags.values() if flag.positional]
    while tokens:
        token = tokens.popleft()
        if places and not token.startswith("-"):
            flag, text = place_of(places, given, token), token
        else:
            head, has_value, text = token.partition("=")
            flag = find(flags, head, token)
            if not has_value:
                text = value_after(flag, tokens, any_may_follow=not places)
        if flag.name in given and not flag.repeats:
            first = given[flag.name][0]
            raise RequestError(f"{flag.label} is given twice: {quote(first)} and {quote(text)}; keep one")
        given.setdefault(flag.name, []).append(text)
    return given


def place_of(places: Sequence[Flag], given: Mapping[str, Sequence[str]], token: str) -> Flag:
    """The first of the arguments without a flag that is not given yet: `token` is its value."""
    for flag in places:
        if flag.name not in given:
            return flag
    others = " and ".join(f"{flag.label} is {quote(given[flag.name][0])}" for flag in places)
    raise RequestError(f"unexpected argument {quote(token)}: {others}; quote a text with spaces")


def find(flags: dict[str, Flag], head: str, token: str) -> Flag:
    """The flag that `head`, the part of `token` before any `=`, names, with hyphens for underscores."""
    name = head[2:].replace("-", "_")
    if head.startswith("--") and name in flags:
        return flags[name]
    known = [f"--{known_name}" for known_name in flags] + ["--help"]
    if token == "--":
        raise RequestError("'--' is not accepted here: every value follows its flag, as in --name value")
    if head.startswith("--"):
        positive = flags.get(name.removeprefix("no").lstrip("_"))
        if positive and positive.kind is KINDS[bool]:
            near = f" (did you mean --{positive.name}=false?)"
        else:
            near = did_you_mean(f"--{name}", known)
        raise RequestError(f"unknown flag {head[:LONGEST_QUOTE]}{near}; flags: {', '.join(known)}")
    if re.match("-[A-Za-z]", head):
        raise RequestError(f"unknown option {quote(token)}: flags begin with two dashes, --help lists them")
    raise RequestError(
        f"unexpected argument {quote(token)}: a value follows its flag, as in --name value; quote one with spaces"
    )


def value_after(flag: Flag, tokens: deque[str], *, any_may_follow: bool) -> str:
    """Take the value of `flag` from the tokens that follow it.

    Where an argument without a flag may follow, only true and false are taken for the value of a switch, and a flag
    that may stand bare takes its value with = alone."""
    if flag.kind is KINDS[bool]:
        is_value = tokens and (tokens[0].lower() in SWITCH or (any_may_follow and not tokens[0].startswith("-")))
        return tokens.popleft() if is_value else "true"
    if flag.bare is not None:
        is_value = tokens and any_may_follow and not tokens[0].startswith("-")
        return tokens.popleft() if is_value else flag.bare
    if not tokens:
        raise RequestError(f"{flag.label} has no value; write --{flag.name} {flag.kind.placeholder}")
    if tokens[0].startswith("--"):
        raise RequestError(
            f"{flag.label} has no value: {tokens[0][:LONGEST_QUOTE]} follows; "
            f"write --{flag.name} {flag.kind.placeholder}, "
            f"or --{flag.name}=--x for a value that begins with --"
        )
    return tokens.popleft()


def quote(text: str) -> str:
    return repr(text if len(text) <= LONGEST_QUOTE else text[: LONGEST_QUOTE - 3] + "...")


def usage(flags_class: type, program: str, summary: str) -> str:
    """The help text, at most HELP_WIDTH columns wide; indented paragraphs of `summary` (examples) stay as they are."""
    flags = describe(flags_class).values()
    shown = [flag for flag in flags if flag.default is MISSING or flag.positional]
    required = "".join(f" {flag.form}" if flag.default is MISSING else f" [{flag.form}]" for flag in shown)
    paragraphs = summary.strip().split("\n\n")
    text = [p if re.search("^ ", p, re.MULTILINE) else textwrap.fill(p, HELP_WIDTH) for p in paragraphs]
    width = max(len(flag.form) for flag in flags if len(flag.form) <= WIDEST_FORM)
    for group, members in itertools.groupby(flags, key=lambda flag: flag.group):
        lines = [entry(flag.form, flag.help + default_note(flag.default), width) for flag in members]
        text.append("\n".join([f"{group} flags:", *lines]))
    text.append(entry("-h, --help", "print this text", width))
    return "\n\n".join([f"usage: {program}{required} [--name value ...]", *text])


def entry(form: str, help: str, width: int) -> str:
    """One flag: its form in a column of `width`, its help beside it, or below it where the form is wider."""
    indent = " " * (width + 4)
    head, first = ("", f"  {form:<{width}}  ") if len(form) <= width else (f"  {form}\n", indent)
    return head + textwrap.fill(
        help, HELP_WIDTH, initial_indent=first, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False
    )


def default_note(default: Any) -> str:
    if default is MISSING or default is None or default == ():
        return " (required)" if default is MISSING else ""
    if isinstance(default, tuple):
        default = " ".join(default)
    return f" (default: {str(default).lower() if isinstance(default, bool) else default})"


def main(
    flags_class: type[Flags],
    verb: Callable[[Flags], int | None],
    *,
    argv: Sequence[str] | None = None,
    program: str | None = None,
    summary: str,
) -> NoReturn:
    """Run `verb` on the flags of `argv` (default: the process's own) and exit with its code, or the error's.

    Of several ranks only the one that may speak prints the help or an error. `program` (default: the process's own)
    and `summary`, a launch file's docstring, head the help.
    """
    tokens = sys.argv[1:] if argv is None else argv
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None: closed by the caller, as in >&-
        stream.reconfigure(encoding="utf-8", errors="replace")  # whatever the locale, an emoji must not end a run
    code: Any = DONE  # Any: a verb's own sys.exit may hold None or text
    log_as_json("--log_json" in tokens)  # what is wrong with the flags is to be told so too
    try:
        if {"-h", "--help"}.isdisjoint(tokens):
            flags = parse(flags_class, tokens)
            log_as_json(getattr(flags, "log_json", False))
            code = verb(flags) or DONE
        elif rank_zero_speaks():
            print(usage(flags_class, f"python {program or sys.argv[0]}", summary))
        print(end="", flush=True)  # what cannot be written is a failure like any other
    except SystemExit as left:
        code = left.code
    except (Exception, KeyboardInterrupt) as error:
        code = RUN_FAILED
        with contextlib.suppress(KeyboardInterrupt):  # a silent rank waits in report
            if not is_broken_stdout(error):
                code = report(naming_stdout(error))
    drop_unwritable_output()
    leave(code)
