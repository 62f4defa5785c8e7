import time

import pytest

from llama_mp import template_meter
from llama_mp.chat_format import render_text
from llama_mp.errors import RequestError
from llama_mp.template_meter import MAX_S


def show(template: str, *contents: str) -> str:
    """The text of `template` for user and assistant saying `contents` in turn."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return render_text(template, messages, "<s>", "</s>")


def test_blocks_are_trimmed_as_hugging_face_does() -> None:
    source = "{% if true %}\na\n{% endif %}\n    {% for m in messages %}\n{{ m.role }}\n    {% endfor %}\nb"
    assert show(source, "x", "y") == "a\nuser\nassistant\nb"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ bos_token }}|{{ eos_token }}|{{ add_generation_prompt }}", "<s>|</s>|True"),
        ("{% if tools is none and documents is none and nothing is not defined %}x{% endif %}", "x"),
        ("{% for m in messages %}{{ loop.index0 }}{{ loop.length }}{{ loop.last }} {% endfor %}", "02False 12True "),
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% break %}{% endfor %}", "one"),
        ("{% for m in messages[1:] %}{{ m['content'] }}{% endfor %}{{ messages[::-1][0].content }}", "twotwo"),
        ("{% set ns = namespace(t='') %}{% for m in messages %}{% set ns.t = ns.t + 'x' %}{% endfor %}{{ns.t}}", "xx"),
        ("{{ messages | map(attribute='content') | join('-') }} {{ '+'.join(['a', 'b']) }}", "one-two a+b"),
        ("{{ messages | selectattr('role', 'equalto', 'user') | list | length }}", "1"),
        ("{{ messages[0].content.split('n')[-1] }}", "e"),
        ("{{ 'abc'.replace('b', '-') }}{{ 'abc' | replace('c', '!') }}", "a-cab!"),
        ("{% macro f(x) %}<{{ x }}>{% endmacro %}{{ f('a') ~ f(1) }}{% set a, b = 1, 2 %}{{ a + b }}", "<a><1>3"),
        ("{% set x %}in{% endset %}{{ x }}{% filter upper %}up{% endfilter %}", "inUP"),
        ("{% generation %}{{ messages[1].content }}{% endgeneration %}!", "two!"),
        ("{{ {'a': ['é<', 1]} | tojson }}", '{"a": ["é<", 1]}'),
        ("{{ {'b': 1} | tojson(indent=2) }}{{ 'a\nb' | indent(2) }}", '{\n  "b": 1\n}a\n  b'),
        ("{% for k, v in {'k': 1}.items() %}{{ k }}{{ v }}{% endfor %}", "k1"),
        ("{{ 'x' * 3 }}{{ 2 ** 5 % 7 }}{{ 7 // 2 }}", "xxx43"),
        ("{{ 'a' in 'cat' and messages[0].role in ['user'] and messages[0].name is not defined }}", "True"),
        ("{{ (strftime_now('%Y') | int) > 2020 }}", "True"),
    ],
)  # fmt: skip
def test_what_templates_use(source: str, expected: str) -> None:
    assert show(source, "one", "two") == expected


def test_template_that_refuses_gives_its_own_message() -> None:
    with pytest.raises(RequestError, match=r"refuses this conversation: Roles must\s+alternate$") as caught:
        show("{{ raise_exception('Roles must\n alternate') }}", "x")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("a\n{% if %}", "fault in line 2: Expected an expression"),
        ("{{ 'a' | shout }}", "No filter named 'shout'"),
        ("{{ messages[0].content.x.y }}", "has no attribute 'x'"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% include 'other' %}", "no loader"),
        ("{{ " + "(" * 2000 + "1" + ")" * 2000 + " }}", "RecursionError"),
        ("x" * 300_000, "300000 characters long"),
    ],
)
def test_faulty_template_is_one_line(source: str, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        show(source, "x")
    assert "\n" not in str(caught.value) and "without --chat" in str(caught.value)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ ''['__class__'].x }}",
        "{{ raise_exception.__globals__.x }}",
        "{{ self.__init__.__globals__ }}",
        "{{ messages.__class__.__base__ }}",
        "{{ dict.mro() }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{{ '' | attr('__class__') }}",
        "{{ ['{0.__class__}'] | map('format', '') | list }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'system'}) }}",
        "{{ cycler.__init__.__globals__.os }}",
    ],
)
def test_sandbox_holds(source: str) -> None:
    with pytest.raises(RequestError, match=r"unsafe|undefined|No filter"):
        show(source, "x")


DOUBLING = "{% set ns = namespace(x=START) %}{% for i in range(99) %}{% set ns.x = STEP %}{% endfor %}{{ ns.x }}"


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 10 ** 12 }}",
        "{{ ([0] * 10 ** 12) | length }}",
        "{{ 10 ** (10 ** 10) }}",
        "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{% for b in 'ab' %}" + "long text " * 100 + "{% endfor %}{% endfor %}",
        "{% set x %}{% for a in range(99999) %}" + "long text " * 100 + "{% endfor %}{% endset %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% for a in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
        "{{ 'a'.ljust(10 ** 5 * 10 ** 5) }}",
        "{{ 'a' | center(10000000000) }}",
        "{{ '%10000000000d' % 1 }}",
        "{{ '{:10000000000}'.format(1) }}",
        "{{ lipsum(n=10000000) }}",
        "{{ (1).to_bytes(10000000000, 'big') }}",
        "{{ 'a\nb' | indent(10000000000) }}",
        "{{ [1] | tojson(indent=10000000000) }}",
        "{{ ('a' * 99999) | replace('a', 'a' * 99999) }}",
        "{{ ('a' * 99999).replace('', 'a' * 99999) }}",
        "{{ ([1] * 99999) | join('a' * 99999) }}",
        "{{ ('a' * 99999).join(['b'] * 99999) }}",
        "{{ ([0] * 99999) | map('default', 'a' * 99999, true) | map('upper') | list | length }}",
        DOUBLING.replace("START", "'a'").replace("STEP", "ns.x ~ ns.x"),
        DOUBLING.replace("START", "'a'").replace("STEP", "ns.x + ns.x"),
        DOUBLING.replace("START", "'a'").replace("STEP", "[ns.x, ns.x] | join"),
        DOUBLING.replace("START", "[1]").replace("STEP", "ns.x + ns.x"),
        DOUBLING.replace("START", "[1]").replace("STEP", "[ns.x, ns.x]"),
        DOUBLING.replace("START", "[1]").replace("STEP", "(ns.x, ns.x)"),
        DOUBLING.replace("START", "[1]").replace("STEP", "{'a': ns.x, 'b': ns.x}"),
        DOUBLING.replace("START", "[1]").replace("STEP", "dict(a=ns.x, b=ns.x)"),
        DOUBLING.replace("START", "9").replace("STEP", "ns.x * ns.x"),
    ],
)
def test_runaway_templates_are_stopped(source: str) -> None:
    start = time.perf_counter()
    with pytest.raises(RequestError) as caught:
        show(source, "x")
    assert "\n" not in str(caught.value)
    assert time.perf_counter() - start < 20


def test_nested_namespaces_are_not_spelled_out() -> None:
    assert show(DOUBLING.replace("START", "1").replace("STEP", "namespace(a=ns.x, b=ns.x)"), "x") == "<Namespace>"


# ---- much time in few units of work ----------------------------------------------------------------------------

CYCLE = "{% set ns = namespace(x=1) %}{% set ns.x = ns %}{% set path = 'x.' * 50000 ~ 'x' %}"
BIG = "{% set text = 'a' * 100000 %}{% set spaces = ' ' * 100000 %}{% set list = [0] * 100000 %}"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ ([[0]] * 99999) | sum(start=[]) | length }}", "unexpected keyword argument 'start'"),
        ("{{ ([0] * 99999) | tojson(separators=('a' * 99999, ':')) | length }}", "separators of at most 16"),
        ("{{ strftime_now('%c' * 99999) }}", "a date of 199998 characters"),
        (CYCLE + "{{ ([ns] * 50000) | sort(attribute=path) | length }}", "an attribute of 50000 steps"),
        (CYCLE + "{{ ([ns] * 50000) | rejectattr(path) | list }}", "an attribute of 50000 steps"),
        (CYCLE + "{{ ([ns] * 50000) | map(attribute=path) | list }}", "an attribute of 50000 steps"),
        (CYCLE + "{{ ([ns] * 50000) | sum(path) }}", "an attribute of 50000 steps"),
        (CYCLE + "{{ [[ns] * 50000] | map('max', attribute=path) | list }}", "an attribute of 50000 steps"),
        (BIG + "{{ list | select('in', list) | list | length }}", "was stopped"),
        (BIG + "{% for i in range(99999) %}{% if 1 is in(list) %}{% endif %}{% endfor %}", "was stopped"),
        (BIG + "{% for i in range(99999) %}{% if text is upper %}{% endif %}{% endfor %}", "was stopped"),
        (BIG + "{{ ([text] * 99999) | reject('upper') | list }}", "was stopped"),
        (BIG + "{{ ([spaces] * 99999) | map('trim') | list }}", "was stopped"),
        (BIG + "{{ ([list] * 99999) | map('max') | list }}", "was stopped"),
        (BIG + "{{ 1 in (([text] * 99999) | map('upper')) }}", "was stopped"),
        (BIG + "{{ 1 is in(([list] * 99999) | map('list')) }}", "was stopped"),
        (BIG + "{{ 1 in (([list] * 99999) | map('tojson')) }}", "was stopped"),
        (BIG + "{{ 1 in (([text] * 99999) | map('indent')) }}", "was stopped"),
        (BIG + "{{ raise_exception([text] * 99999) }}", "was stopped"),
        (BIG + "{% for i in range(99999) %}{{ ([text] * 99).count('b' ~ text) }}{% endfor %}", "was stopped"),
        (BIG + "{{ (text * 2).rfind('ab' ~ text) }}", "was stopped"),
        (BIG + "{{ (text * 2).rsplit('ab' ~ text) }}", "was stopped"),
        (BIG + "{{ text.strip('b' * 99999 ~ 'a') }}", "was stopped"),
        (BIG + "{{ text | trim('b' * 99999 ~ 'a') }}", "was stopped"),
        ("{{ 1" + "~1" * 60000 + " }}", "120007 characters long"),
    ],
)
def test_what_takes_much_time_is_refused_or_paid_for(source: str, message: str) -> None:
    start = time.perf_counter()
    with pytest.raises(RequestError, match=message) as caught:
        show(source, "x")
    assert "\n" not in str(caught.value)
    assert time.perf_counter() - start < MAX_S


@pytest.mark.parametrize(
    "source",
    [
        "{% set t = (1,) * 99999 %}{% set d = {t: 1} %}{% for i in range(99999) %}{% set x = d[t] %}{% endfor %}",
        "{% set a = 3 ** 400000 %}{% set b = 3 ** 200000 %}{% for i in range(9999) %}{% set y = a // b %}{% endfor %}",
    ],
)
def test_the_clock_ends_what_the_budget_does_not(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_meter, "MAX_S", 0.2)
    with pytest.raises(RequestError, match="was stopped"):
        show(source, "x")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ [1, 2, 3] | sum }}{{ [{'a': 2}] | sum(attribute='a') }}", "62"),
        ("{{ messages[0].content.strip() }}{{ ' a.b. ' | trim }}{{ '..a..' | trim('.') }}", "xa.b.a"),
        ("{{ [3, 1] | sort | first }}{{ [1, 1] | unique | list | length }}{{ {'b': 1} | dictsort }}", "11[('b', 1)]"),
        ("{{ [1] | tojson(separators=(',', ':')) }}{{ 'abc'.rfind('c') }}{{ 'a b'.rsplit(' ', 1)[1] }}", "[1]2b"),
        ("{{ 1 is in [1] }}{{ 'A' is upper }}{{ 4 is divisibleby 2 }}{{ x is undefined }}", "TrueTrueTrueTrue"),
        ("{{ ['A', 'b'] | select('upper') | list }}{{ [1, 2] | reject('eq', 1) | list }}", "['A'][2]"),
    ],
)  # fmt: skip
def test_metered_filters_and_tests_do_what_jinja2_does(source: str, expected: str) -> None:
    assert show(source, "x") == expected
