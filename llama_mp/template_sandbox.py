"""Runs a chat template, a jinja2 program that came with the weights from anybody, on a budget of work.

jinja2's sandbox keeps a template from the machine's files; it does not keep it from the machine's memory and
time. Here every loop step, every call and every character or element made is paid for, before or as it is made.
Whatever a template must not have (a name, a method, a filter) is absent from a list of what it may.
"""

from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from llama_mp.errors import RequestError
from llama_mp.template_meter import METER, STEP, Meter, OverBudget, filters, join, paid, paid_output, replace, tests

MAX_TEMPLATE_CHARS = 2**16  # models' have a few thousand; compiling takes seconds for each hundred thousand
MAX_FORM = 200  # of a date

# fmt: off
# What chat templates use, without what makes long values from short ones (center, ljust, format, ...).
METHODS: dict[type, frozenset[str]] = {
    str: frozenset({
        "capitalize", "count", "endswith", "find", "index", "isalnum", "isalpha", "isdigit", "islower", "isspace",
        "isupper", "join", "lower", "lstrip", "partition", "removeprefix", "removesuffix", "replace", "rfind",
        "rpartition", "rsplit", "rstrip", "split", "splitlines", "startswith", "strip", "title", "upper",
    }),
    dict: frozenset({"get", "items", "keys", "values"}),
    list: frozenset({"count", "index"}),
    tuple: frozenset({"count", "index"}),
    int: frozenset(),
    float: frozenset(),
}
# fmt: on
QUADRATIC = (
    "lstrip",
    "rfind",
    "rpartition",
    "rsplit",
    "rstrip",
    "strip",
)  # in the lengths of the text and the argument


def render(template: str, variables: Mapping[str, Any], budget: int) -> str:
    """The text of `template`, made with at most `budget` units of work; any failure of it is a RequestError."""
    try:
        return compile_template(template).render({**variables, METER: Meter(budget)})
    except Refusal as error:
        raise RequestError(f"the chat template refuses this conversation: {' '.join(str(error).split())}") from error
    except OverBudget as error:
        fault, cause = "was stopped: it loops without end, or makes a text much longer than the conversation", error
    except TemplateSyntaxError as error:
        fault, cause = f"has a fault in line {error.lineno}: {error.message}", error
    except Exception as error:  # the template is a program of somebody else's: it may raise anything
        fault, cause = f"failed ({' '.join(f'{type(error).__name__}: {error}'[:500].split())})", error
    raise RequestError(f"the chat template {fault}; give infer a plain prompt, without --chat") from cause


@lru_cache(maxsize=4)
def compile_template(source: str) -> Template:
    if len(source) > MAX_TEMPLATE_CHARS:
        raise SecurityError(f"it is {len(source)} characters long, above {MAX_TEMPLATE_CHARS}")
    environment = MeteredEnvironment()
    tree = Metering().visit(environment.parse(source)).set_environment(environment)
    return environment.template_class.from_code(environment, environment.compile(tree), environment.make_globals(None))


class Refusal(TemplateError):
    """The template called raise_exception."""


def raise_exception(message: str) -> None:
    raise Refusal(str(message)[:500])


def strftime_now(form: str) -> str:
    if len(form) > MAX_FORM:  # the library makes up to 256 characters of each
        raise SecurityError(f"a date of {len(form)} characters")
    return datetime.now().strftime(form)


class OpaqueNamespace(Namespace):
    """A namespace whose text does not show what it holds, which nobody has paid for as a text."""

    def __repr__(self) -> str:
        return "<Namespace>"


class GenerationTag(Extension):
    """{% generation %} marks the assistant's words for training; here its body is simply text."""

    tags = frozenset({"generation"})

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class MeteredEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox of Hugging Face's chat templates, with a Meter in the variables of each rendering."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        # optimized=False: no constant is computed while compiling, before there is a meter.
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            finalize=paid_output,
            extensions=["jinja2.ext.loopcontrols", GenerationTag],
        )
        self.filters, self.tests = filters(), tests()
        functions = {"raise_exception": raise_exception, "strftime_now": strftime_now}
        self.globals = {"range": self.globals["range"], "dict": dict, "namespace": OpaqueNamespace} | functions

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        listed = next((names for kind, names in METHODS.items() if isinstance(obj, kind)), None)
        return super().is_safe_attribute(obj, attr, value) and (listed is None or attr in listed)

    def wrap_str_format(self, value: Any) -> None:
        """jinja2 would let str.format pass with its own formatter, which accepts any field width."""

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        meter = context[METER]
        if operator == "%" and isinstance(left, str):
            raise SecurityError("formatting with % is not allowed; ~ joins texts")
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            meter.spend(left.bit_length() * max(right, 0))
        if operator == "*":
            for values, count in ((left, right), (right, left)):
                if isinstance(values, str | list | tuple) and isinstance(count, int):
                    meter.spend(meter.pay(values) * max(count, 0))
        return paid(context, super().call_binop(context, operator, left, right))

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        owner, meter = getattr(function, "__self__", None), context[METER]
        meter.spend(STEP)
        # Macros take what they are given as it is; Python's own functions compare, search or write it out.
        as_text = not isinstance(function, Macro | LoopContext)
        meter.pay([owner, *kwargs.values()], as_text)
        args = tuple(paid(context, argument, as_text) for argument in args)
        if isinstance(owner, str):
            if function.__name__ == "join":
                return join(context, *args, separator=owner)
            if function.__name__ == "replace":
                return replace(context, owner, *args)
            if function.__name__ in QUADRATIC:
                meter.spend(len(owner) * sum(len(argument) for argument in args if isinstance(argument, str)))
        return paid(context, super().call(context, function, *args, **kwargs))


class Metering(NodeTransformer):
    """Rewrites a template's syntax tree so that what is made or read without a call passes through `paid`."""

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:
        return nodes.Const(node.data, lineno=node.lineno)  # `finalize` sees constants, but not template data

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = filtered(node.iter, "steps")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        node.nodes = [filtered(part, "paid", as_text=True) for part in node.nodes]
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = filtered(node.expr, "paid", as_text=True)
        for operand in node.ops:
            operand.expr = filtered(operand.expr, "paid", as_text=True)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = filtered(node.node, "paid")
        return node

    def visit_literal(self, node: nodes.Literal) -> nodes.Node:
        self.generic_visit(node)
        is_target = isinstance(node, nodes.Tuple) and node.ctx != "load"
        return node if is_target else filtered(node, "paid")

    visit_List = visit_Tuple = visit_Dict = visit_literal


def filtered(node: nodes.Expr, name: str, as_text: bool = False) -> nodes.Filter:
    """The expression `node|name`."""
    options = [nodes.Const(True)] if as_text else []
    return nodes.Filter(node, name, options, [], None, None, lineno=node.lineno)
