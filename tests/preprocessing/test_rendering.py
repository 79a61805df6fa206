"""rendering.py: what templates may do, and that what they must not or cannot do is one Fault."""

from __future__ import annotations

import pytest
from conftest import says

from preprocessing.faults import Fault
from preprocessing.rendering import compile_template, render

RAISING = {
    "own": ("{{ raise_exception('no') }}", says("template refuses")),
    "missing key": ("{{ messages[0].content + messages[0].x }}", says("template refuses")),
    "none": ("{{ none + 'x' }}", says("cannot render")),
    "zero": ("{{ 1 / 0 }}", says("cannot render")),
    "range": ("{% for i in range(10**9) %}{% endfor %}", says("cannot render")),
    "endless recursion": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", says("cannot render")),
    "too deeply nested": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", says("cannot render")),
    "include": ("{% include '/etc/passwd' %}", says("cannot render")),
    "class": ("{{ messages.__class__.__mro__ }}", says("template refuses")),
    "globals": ("{{ cycler.__init__.__globals__ }}", says("template refuses")),
    "change": ("{{ messages.append(1) }}", says("template refuses")),
    "syntax": ("{% if %}", says("no valid Jinja")),
    "filter": ("{{ 'a'|nothing }}", says("no valid Jinja")),
}


@pytest.mark.parametrize("name", RAISING)
def test_a_template_that_raises_is_a_fault(name: str):
    text, code = RAISING[name]
    with pytest.raises(Fault) as raised:
        render(text, {"messages": [{"role": "user", "content": "a"}]}, {})
    assert raised.value.message.sentence == code


def test_what_templates_may_do():
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for text, expected in {
        "{% for m in messages %}{{ loop.length }}{{ loop.last }}{{ m.content ~ 1 }}{% endfor %}": "2Falsea12Trueb1",
        "{% for x in [1, 2, 3] %}{% if x == 2 %}{% break %}{% endif %}{{ x }}{% endfor %}": "1",
        "{{ '你<'|tojson }}{{ '%03d'|format(4) }}": '"你<"004',
        "{{ eos_token }}{{ add_generation_prompt }}{{ enable_thinking }}": "</s>FalseTrue",
        "{% if x is defined %}{% endif %}\n  {% generation %}a{% endgeneration %}": "\ufdd0a\ufdd0",
    }.items():
        assert render(text, {"messages": messages}, {"eos_token": "</s>"}) == expected
        assert compile_template(text) is compile_template(text)
