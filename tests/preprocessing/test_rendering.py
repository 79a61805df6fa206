"""rendering.py: a template that loops, writes without end or raises ends in one Fault, soon, in little memory."""

from __future__ import annotations

import resource
import time

import pytest
from conftest import says, user_error
from test_template import with_own

from common import Message
from preprocessing.faults import Fault
from preprocessing.prompts import prompt_ids
from preprocessing.rendering import compile_template, render_template
from preprocessing.template import load_template

GROWING = "{%% set ns = namespace(s=%s) %%}{%% for i in range(100) %%}{%% set ns.s %s %%}{%% endfor %%}{{ ns.s }}"
ENDLESS = {
    "loops": "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "output": "{% for i in range(100000) %}{% for j in range(100000) %}x{% endfor %}{% endfor %}",
    "macro": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "two macros": "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "recursive loop": "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "repeated": "{{ 'x' * 10**9 }}",
    "power": "{{ 10 ** (10 ** 8) }}",
    "center": "{{ 'x'.center(10**9) }}",
    "center filter": "{{ 'x'|center(10**9) }}",
    "percent": "{{ '%999999999d' % 1 }}",
    "percent width": "{{ '%*d' % (999999999, 1) }}",
    "format": "{{ '{:999999999}'.format(1) }}",
    "format width": "{{ '{:{}}'.format(1, 999999999) }}",
    "format filter": "{{ '%999999999d'|format(1) }}",
    "replace": "{{ ('x' * 10**6).replace('x', 'y' * 10**6) }}",
    "replace filter": "{{ ('x' * 10**6)|replace('x', 'y' * 10**6) }}",
    "join": "{{ ''.join(['x' * 10**6] * 10**4) }}",
    "join filter": "{{ (['x' * 10**6] * 10**4)|join }}",
    "indent": "{{ {}|tojson(indent=10**9) }}",
    "batch": "{{ [1]|batch(10**9, 'x')|list }}",
    "slice": "{{ [1]|slice(10**9)|list }}",
    "added text": GROWING % ("'x'", "= ns.s + ns.s"),
    "joined text": GROWING % ("'x'", "= ns.s ~ ns.s"),
    "captured text": GROWING % ("'x'", "%}{{ ns.s }}{{ ns.s }}{% endset"),
    "added lists": GROWING % ("[1]", "= ns.s + ns.s"),
    "numbers": GROWING % ("9", "= ns.s * ns.s"),
    "nested": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "huge": "x" * 2_000_000,
}
RAISING = {
    "own": ("{{ raise_exception('no') }}", says("template refuses")),
    "missing key": ("{{ messages[0].content + messages[0].x }}", says("template refuses")),
    "none": ("{{ none + 'x' }}", says("cannot render")),
    "zero": ("{{ 1 / 0 }}", says("cannot render")),
    "range": ("{% for i in range(10**9) %}{% endfor %}", says("cannot render")),
    "include": ("{% include '/etc/passwd' %}", says("cannot render")),
    "class": ("{{ messages.__class__.__mro__ }}", says("template refuses")),
    "globals": ("{{ cycler.__init__.__globals__ }}", says("template refuses")),
    "change": ("{{ messages.append(1) }}", says("template refuses")),
    "syntax": ("{% if %}", says("no valid Jinja")),
    "filter": ("{{ 'a'|nothing }}", says("no valid Jinja")),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_without_end_is_stopped(name: str):
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.thread_time()
    with pytest.raises(Fault) as raised:
        render_template(ENDLESS[name], {"messages": [{"role": "user", "content": "a"}]})
    assert raised.value.message == Message("the chat template loops for too long or writes too much")
    assert time.thread_time() - start < 8  # seconds
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 700_000  # KB


@pytest.mark.parametrize("name", RAISING)
def test_a_template_that_raises_is_a_fault(name: str):
    text, code = RAISING[name]
    with pytest.raises(Fault) as raised:
        render_template(text, {"messages": [{"role": "user", "content": "a"}]})
    assert raised.value.message.sentence == code


def test_a_model_with_such_a_template_is_refused_in_one_sentence(tiny_tokenizer):
    tokenizer = with_own(tiny_tokenizer, ENDLESS["loops"])
    with user_error(
        "the chat template ({template}) cannot be used: {reason}.\n{advice}",
        reason=Message("the chat template loops for too long or writes too much"),
    ):
        load_template(None, tokenizer)
    with user_error("these messages", reason=Message("the chat template loops for too long or writes too much")):
        prompt_ids([{"role": "user", "content": "a"}], tokenizer)


def test_the_limits_change_nothing_of_what_templates_may_do():
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for text, expected in {
        "{% for m in messages %}{{ loop.length }}{{ loop.last }}{{ m.content ~ 1 }}{% endfor %}": "2Falsea12Trueb1",
        "{% for r in messages|map(attribute='role') %}{{ r ~ loop.length ~ loop.last }}{% endfor %}": (
            "user2Falseassistant2True"
        ),
        "{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% endfor %}": "a1",
        "{% for k in nothing %}x{% else %}none{% endfor %}": "none",
        "{% for x in [1, 2, 3] %}{% if x == 2 %}{% break %}{% endif %}{{ x }}{% endfor %}": "1",
        "{% for x in [1, [2, [3]]] recursive %}{{ loop(x) if x is iterable else x }}{% endfor %}": "123",
        "{{ '你'|tojson }}{{ '%03d'|format(4) }}{{ ['a', 'b']|join(', ') }}": '"你"004a, b',
        "{{ 'aXb'|replace('X', '-') }}": "a-b",
        "{{ messages|map(attribute='content')|join('+') }}": "a+b",
        "{{ messages|join(',', attribute='role') }}": "user,assistant",
        "{% set x %}a{{ 1 + 2 }}{% endset %}{{ x * 2 }}{{ 7 % 4 }}{{ 2 ** 10 }}": "a3a331024",
        "{% generation %}a{% endgeneration %}": "\ufdd0a\ufdd0",
    }.items():
        assert render_template(text, {"messages": messages}) == expected


def test_a_long_conversation_is_within_the_limits():
    messages = [{"role": "user", "content": "text " * 1000}] * 2000  # ten million characters
    text = "{% set ns = namespace(t='') %}{% for m in messages %}{% set ns.t = ns.t + m.content[:9] %}{{ m.content }}"
    assert len(render_template(text + "{% endfor %}{{ ns.t }}", {"messages": messages})) == 10_018_000
    assert compile_template(text + "{% endfor %}") is compile_template(text + "{% endfor %}")
