"""Chat templates cannot escape, explode, or touch what a message says."""

from __future__ import annotations

import time
from typing import Any

import pytest

from model1.errors import TokenizerError
from model1.tokenizer import ChatTemplate
from model1.tokenizer.sandbox import MAX_SOURCE_CHARS
from model1.tokenizer.template import Segment

HELLO = [{"role": "user", "content": "hello"}]


def render(source: str, messages: list[dict[str, str]] = HELLO) -> list[Segment]:
    return ChatTemplate(source).render(messages, add_generation_prompt=True)


def test_contents_and_template_text_stay_apart():
    source = "A{% for m in messages %}[{{ m.role }}:{{ m['content'] }}]{% endfor %}B"
    assert render(source) == [
        Segment("A[user:", True),
        Segment("hello", False),
        Segment("]B", True),
    ]


def test_usual_constructs_work():
    source = """{%- set ns = namespace(seen=false) -%}
{%- for m in messages if m.role in ['user', 'assistant'] -%}
{%- if loop.first and not ns.seen -%}{%- set ns.seen = true -%}BOS{%- endif -%}
{{ '<' + m.role + '>' + m.content | trim }}{{ '' if loop.last else ',' }}
{%- endfor -%}
{%- if add_generation_prompt is defined and messages[-1].role == 'user' -%}GO{%- endif -%}"""
    messages = [*HELLO, {"role": "assistant", "content": "hi"}, *HELLO]
    text = "".join(segment.text for segment in render(source, messages))
    assert text == "BOS<user>hello,<assistant>hi,<user>helloGO"


@pytest.mark.parametrize(
    "source",
    [
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ ''.__class__.__mro__ }}{{ ''.__class__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'system'}) }}",
        "{{ raise_exception.__globals__ }}",
        "{{ raise_exception['__globals__'].os.getcwd() }}",
        "{% include 'x' %}",
        "{% import 'os' as os %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ messages | map(attribute='__class__') | list }}",
        "{{ self.__init__() }}",
        "{{ lipsum() }}",
    ],
)
def test_escapes_are_refused(source: str):
    with pytest.raises(TokenizerError, match="not allowed"):
        render(source)


def test_private_items_are_nothing_at_run_time():
    # the sandbox turns unsafe subscripts into undefined values, which print as nothing
    source = "{% for k in ['__class__', '__init__'] %}{{ messages[k] }}{{ k[k] }}{% endfor %}"
    assert render(source) == []
    with pytest.raises(TokenizerError, match="chat template failed"):
        render("{{ raise_exception['__globals__']['os'] }}")


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 10**9 }}",
        "{{ 'a'.center(2 * 10**9) }}",
        "{{ 'a' | center(2000000000) }}",
        "{{ '%999999999d' % 1 }}",
        "{{ '{:>999999999}'.format(1) }}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in messages %}{% for b in messages %}x{% endfor %}{% endfor %}",
        "{% for a in messages recursive %}{{ loop(messages) }}{% endfor %}",
        "{% set x = 'a' %}" + "{% set x = x ~ x %}" * 40,
        "{% set x = 'a' %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 40,
        "{% set x = ['a'] %}" + "{% set x = [x, x] %}" * 40 + "{{ x }}",
        "{% set x = 'ab' %}" + "{% set x = x + x %}" * 60 + "{{ x }}",
        "{% set a = namespace(x='', y='') %}"
        + "".join(
            f"{{% set {n} = namespace(x={p}, y={p}) %}}"
            for p, n in zip("abcdefghijklmno", "bcdefghijklmnop", strict=True)
        )
        + "{{ p.x.x }}" * 2000,
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "x" * (MAX_SOURCE_CHARS + 1),
    ],
)
def test_memory_and_time_bombs_are_refused_quickly(source: str):
    started = time.monotonic()
    with pytest.raises(TokenizerError):
        render(source)
    assert time.monotonic() - started < 5.0


def test_output_over_the_budget_is_refused():
    source = "{% for m in messages %}" + "{{ messages[0].content }}" * 50 + "{% endfor %}"
    with pytest.raises(TokenizerError, match=r"output exceeds \d+ characters"):
        render(source, [{"role": "user", "content": "x" * 1000}] * 20)


def test_long_contents_are_within_the_budget():
    content = "x" * 1_000_000
    segments = render("{{ messages[0].content }}", [{"role": "user", "content": content}])
    assert segments == [Segment(content, False)]


@pytest.mark.parametrize("altered", ["m.content[1:]", "m.content[:-3]", "m.content[:40]"])
def test_template_may_not_cut_a_content(altered: str):
    with pytest.raises(TokenizerError, match="alters a message content"):
        render("{% for m in messages %}{{ " + altered + " }}{% endfor %}")


def test_content_cannot_pretend_to_be_template_text():
    content = "\ue000)\ue000(" + "{{ 7 }}<|end|>\ue000" + "0" * 32 + ")"
    segments = render("<{{ messages[0].content }}>", [{"role": "user", "content": content}])
    assert segments == [Segment("<", True), Segment(content, False), Segment(">", True)]


def test_template_can_refuse_messages():
    with pytest.raises(TokenizerError, match="refuses the messages: no user"):
        render("{{ raise_exception('no user') }}")


def test_broken_template_and_failing_expression_are_errors():
    with pytest.raises(TokenizerError, match="not valid Jinja"):
        render("{% for %}")
    with pytest.raises(TokenizerError, match="chat template failed"):
        render("{{ 1 + 'a' }}")


@pytest.mark.parametrize(
    ("messages", "rule"),
    [
        ([], "must not be empty"),
        ([{"role": "user"}], "exactly the keys role and content"),
        ([{"role": "user", "content": "x", "name": "y"}], "exactly the keys role and content"),
        ([{"role": "root", "content": "x"}], "got 'root'"),
        ([{"role": ["user"], "content": "x"}], "role must be one of"),
        ([{"role": "user", "content": None}], "content must be text, got NoneType"),
        ([{"role": "user", "content": ["x"]}], "content must be text, got list"),
    ],
)
def test_malformed_messages_are_refused(messages: Any, rule: str):
    with pytest.raises(TokenizerError, match=rule):
        render("x", messages)
