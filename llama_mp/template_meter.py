"""The budget of a chat template's rendering, and the filters and tests that spend it.

Whatever a template does takes units of work, a budget of which is the same on every machine. Few units can hide much
time in one of Python's own operations, so those are bounded or absent, and a clock ends what is missing here.
"""

import json
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

from jinja2 import pass_context
from jinja2.exceptions import SecurityError
from jinja2.filters import FILTERS, do_indent, do_sum
from jinja2.runtime import Context
from jinja2.tests import TESTS
from jinja2.utils import _PassArg

STEP = OUTPUT_CHAR = 10  # units of work; a character or an element made is 1
METER = " meter"  # a variable with a space in its name: no template can spell it
MAX_S = 5.0  # for one rendering: known templates take milliseconds
MAX_DOTS = 8

# fmt: off
# What chat templates use, without what makes long values from short ones (center, format, lipsum, ...).
CONSTANT_TIME_FILTERS = frozenset({"count", "d", "default", "first", "last", "length", "safe"})
LIST_FILTERS = frozenset({"items", "list", "map", "reject", "rejectattr", "reverse", "select", "selectattr"})
TEXT_FILTERS = frozenset({
    "abs", "capitalize", "dictsort", "e", "escape", "float", "int", "lower", "max", "min", "sort", "string",
    "title", "trim", "unique", "upper",
})
CONSTANT_TIME_TESTS = frozenset({
    "boolean", "callable", "defined", "even", "false", "float", "integer", "iterable", "mapping", "none", "number",
    "odd", "sameas", "sequence", "string", "true", "undefined",
})
COMPARING_TESTS = frozenset({
    "!=", "<", "<=", "==", ">", ">=", "divisibleby", "eq", "equalto", "ge", "greaterthan", "gt", "in", "le", "lessthan",
    "lower", "lt", "ne", "upper",
})
# fmt: on


class OverBudget(Exception):
    """Not one of the exceptions that jinja2's own filters catch (TypeError, ValueError, LookupError)."""


class Meter:
    """What is left of one rendering's budget."""

    def __init__(self, budget: int) -> None:
        self.left = budget
        self.end_s = time.monotonic() + MAX_S

    def spend(self, units: int) -> None:
        self.left -= units
        if self.left < 0 or time.monotonic() > self.end_s:
            raise OverBudget

    def pay(self, value: Any, as_text: bool = False) -> int:
        """Spend the units that `value` is worth, and return them.

        A text: its characters; anything else: its elements at every depth, and `as_text` their characters.
        """
        if isinstance(value, str):
            as_text = True
        before, stack = self.left, [value]
        while stack:
            item = stack.pop()
            self.spend(1)
            if isinstance(item, range) or (as_text and isinstance(item, str)):
                self.spend(len(item))
            elif isinstance(item, int):
                self.spend(item.bit_length())
            elif isinstance(item, Mapping):
                stack += [*item.keys(), *item.values()]
            elif isinstance(item, Collection) and not isinstance(item, str):
                stack += item
        return before - self.left

    def each(self, items: Iterable[Any], as_text: bool = False) -> Iterator[Any]:
        for item in items:
            self.spend(STEP)
            self.pay(item, as_text)
            yield item


@pass_context
def paid(context: Context, value: Any, as_text: bool = False) -> Any:
    """`value`, paid for: at once, or item by item when it is still being made."""
    if isinstance(value, Iterator):
        return context[METER].each(value, as_text)
    context[METER].pay(value, as_text)
    return value


@pass_context
def steps(context: Context, values: Iterable[Any]) -> Iterator[Any]:
    return context[METER].each(values)


@pass_context
def paid_output(context: Context, value: Any) -> Any:
    context[METER].spend((OUTPUT_CHAR - 1) * context[METER].pay(value, as_text=True))
    return value


@pass_context
def join(context: Context, values: Iterable[Any], separator: str = "", attribute: str | None = None) -> str:
    if attribute is not None:
        values = [context.environment.getitem(value, attribute) for value in values]
    texts = [str(value) for value in context[METER].each(values, as_text=True)]
    context[METER].spend(len(texts) * len(separator))
    return separator.join(texts)


@pass_context
def replace(context: Context, text: Any, old: Any, new: Any, count: int = -1) -> str:
    text, old, new = (str(paid(context, part, as_text=True)) for part in (text, old, new))
    context[METER].spend(text.count(old) * len(new))
    return text.replace(old, new, count)


@pass_context
def indent(context: Context, text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    context[METER].pay(text)
    context[METER].spend((text.count("\n") + 1) * (width if isinstance(width, int) else len(width)))
    return do_indent(text, width, first, blank)


@pass_context
def total(context: Context, values: Iterable[Any], attribute: str | None = None) -> Any:
    """Without the `start` of jinja2's sum: to lists, lists are added in quadratic time."""
    check_path(attribute)
    return do_sum(context.environment, paid(context, values), attribute)


@pass_context
def to_json(
    context: Context,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """As Hugging Face's: without HTML escapes."""
    if indent is not None and not (isinstance(indent, int) and 0 <= indent <= 16):
        raise SecurityError("tojson: an indent from 0 to 16 is allowed")
    if separators is not None and not all(isinstance(part, str) and len(part) <= 16 for part in separators):
        raise SecurityError("tojson: separators of at most 16 characters are allowed")
    value = paid(context, value, as_text=True)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def check_path(path: Any) -> None:
    """Refuse an `attribute` of many steps, all of which would be gone for each of many values."""
    if isinstance(path, str) and path.count(".") > MAX_DOTS and not any(map(str.isspace, path)):
        raise SecurityError(f"an attribute of {path.count('.')} steps")


def metered_filter(name: str) -> Callable[..., Any]:
    """jinja2's filter, which pays for its value itself: also where `map` is who calls it."""
    function = FILTERS[name]
    kind = _PassArg.from_obj(function)

    @pass_context
    def metered(context: Context, value: Any, *options: Any, **named: Any) -> Any:
        value = paid(context, value, as_text=name not in LIST_FILTERS)
        for option in (*options, *named.values()):
            if name == "trim":  # each character is looked for among those to take off
                context[METER].spend(len(str(value)) * len(str(option)))
            else:
                check_path(option)
        passed = {None: (), _PassArg.context: (context,), _PassArg.environment: (context.environment,)}
        return function(*passed.get(kind, (context.eval_ctx,)), value, *options, **named)

    return metered


def metered_test(name: str) -> Callable[..., Any]:
    """jinja2's test, which pays for what it compares."""
    function = TESTS[name]

    @pass_context
    def metered(context: Context, *operands: Any) -> Any:
        return function(*(paid(context, operand, as_text=True) for operand in operands))

    return metered


def filters() -> dict[str, Callable[..., Any]]:
    constant = {name: FILTERS[name] for name in CONSTANT_TIME_FILTERS}
    metered = {name: metered_filter(name) for name in LIST_FILTERS | TEXT_FILTERS}
    own = {"indent": indent, "join": join, "replace": replace, "sum": total, "tojson": to_json}
    return constant | metered | own | {"paid": paid, "steps": steps}


def tests() -> dict[str, Callable[..., Any]]:
    return {name: TESTS[name] for name in CONSTANT_TIME_TESTS} | {name: metered_test(name) for name in COMPARING_TESTS}
