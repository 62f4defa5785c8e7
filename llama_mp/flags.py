"""Flags classes: frozen dataclasses whose fields are flags of a command, fields of a JSON line, or keywords."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from llama_mp.errors import RequestError, did_you_mean

REQUIRED: Any = MISSING  # as the default of a flag


def flag(default: Any, help: str, *, positional: bool = False, bare: str | None = None) -> Any:
    """A dataclass field that is also a command-line flag. A positional one may be given without its name too.

    `bare`: what the flag stands for when no value follows its name; None where one must."""
    return field(default=default, metadata={"help": help, "positional": positional, "bare": bare})


class Flags:
    """Base of every flags class, so that each one's checks run when several are inherited."""

    def __post_init__(self) -> None:
        pass


def texts_given(flags: Flags) -> Iterator[tuple[str, str | None]]:
    """The name and the text of each flag that differs from its default, one that repeats as often as it was given;
    None for a switch that is on."""
    for f in fields(flags):
        value = getattr(flags, f.name)
        if value != f.default:
            for one in value if isinstance(value, tuple) else (value,):
                yield f.name, None if one is True else str(one)


def words_of(flags: Flags) -> list[str]:
    """The words of a command line that makes these flags again."""
    return [word for name, text in texts_given(flags) for word in flag_words(name, text)]


def flag_words(name: str, text: str | None) -> list[str]:
    """A flag and its value; one that looks like a flag itself must stand in the same word."""
    if text is None:
        return [f"--{name}"]
    return [f"--{name}={text}"] if text.startswith("-") else [f"--{name}", text]


def check_at_least(flags: Any, **least: float) -> None:
    """Raise RequestError when a field of `flags` is below its `least` (None passes, NaN does not)."""
    for name, bound in least.items():
        value = getattr(flags, name)
        if value is not None and not bound <= value < float("inf"):
            raise RequestError(f"--{name} is {value}, but must be at least {bound}")


def checked(flags_class: type, values: Mapping[str, Any], others: Sequence[str] = ()) -> dict[str, Any]:
    """`values` for the fields of `flags_class`, as JSON or a Python caller gives them.

    Raises RequestError for unknown names, which lists the valid ones (`others` too), and for wrong types."""
    hints = {f.name: get_type_hints(flags_class)[f.name] for f in fields(flags_class)}
    for name in values:
        if name not in hints:
            valid = ", ".join([*others, *hints])
            raise RequestError(f"unknown field {name!r}{did_you_mean(name, hints)}; valid: {valid}")
    return {name: converted(name, value, hints[name]) for name, value in values.items()}


def converted(name: str, value: Any, hint: Any) -> Any:
    """`value` as the type `hint` wants it: a whole number passes for a float, a text for a path or a tuple of one."""
    options = get_args(hint) if get_origin(hint) is UnionType else (hint,)
    for option in options:
        if option is NoneType and value is None:
            return None
        if get_origin(option) is Literal and isinstance(value, str) and value in get_args(option):
            return value
        if get_origin(option) is tuple and isinstance(value, str):
            return (value,)
        if get_origin(option) is tuple and isinstance(value, list | tuple) and all(isinstance(v, str) for v in value):
            return tuple(value)
        if option is Path and isinstance(value, str | Path):
            return Path(value).expanduser()
        if (option is float and type(value) in (int, float)) or (option in (int, bool, str) and type(value) is option):
            return value
    raise RequestError(f"{name} is {value!r}, but must be {' or '.join(map(described, options))}")


def described(option: Any) -> str:
    if get_origin(option) is Literal:
        return f"one of {', '.join(get_args(option))}"
    if get_origin(option) is tuple:
        return "a text or a list of texts"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", Path: "a path"}
    return names.get(option, "None")
