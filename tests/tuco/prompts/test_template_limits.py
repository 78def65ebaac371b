"""Which templates are tame, and what limits say of those that are."""

import sys
import time

import jinja2
import pytest

from tests.tuco.tiny import tiny_tokenizer
from tuco_jax.prompts.chat_templates import TEMPLATES
from tuco_jax.prompts.template_limits import (
    TooMuchError,
    limited,
    most_characters,
    names,
    tame,
)

# Much as the models' own: Llama 3.1's, Qwen 3's, Mistral's.
OWN = {
    "tiny": str(tiny_tokenizer().chat_template),
    "llama": """\
{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
{%- set system_message = messages[0]['content']|trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system_message = "" %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" + system_message + "<|eot_id|>" }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message['role'] + '<|end|>\\n\\n'+ message['content'] | trim }}
{%- endfor %}""",
    "qwen": """\
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
{%- set index = (messages|length - 1) - loop.index0 %}
{%- if ns.multi_step_tool and message.role == "user" and not
 (message.content.startswith('<tool_response>') and message.content.endswith('</tool>')) %}
{%- set ns.multi_step_tool = false %}{%- set ns.last_query_index = index %}
{%- endif %}{%- endfor %}
{%- for message in messages %}{%- set content = message.content %}
{%- if '</think>' in content %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}
{%- if message.tool_calls %}{%- for tool_call in message.tool_calls %}
{{- tool_call.arguments | tojson }}{%- endfor %}{%- endif %}
{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}{%- endfor %}""",
    "mistral": "{% set ns = namespace(index=0) %}{% for m in messages %}"
    "{% if (m.role == 'user') != (ns.index % 2 == 0) %}{{ raise_exception('turns') }}{% endif %}"
    "{% set ns.index = ns.index + 1 %}{{ m.content }}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% if loop.index0 % 2 == 1 %}{{ eos_token }}{% endif %}{% endfor %}",
} | TEMPLATES


@pytest.mark.parametrize("name", OWN)
def test_templates_of_models_are_tame(name):
    assert tame(OWN[name])


@pytest.mark.parametrize(
    "template",
    [
        "{% set ns = namespace(x='%9999d') %}{{ ns.x % 2 }}",
        "{% set ns = namespace(x=1) %}{% set ns.x = messages[0].content %}{{ ns.x % 2 }}",
        "{% set ns = namespace(x=1) %}{% set ns.y = ns %}{{ ns.y }}",
        "{{ messages | tojson | tojson | tojson | tojson | tojson | tojson | tojson | tojson | "
        "tojson }}",
        "{{ x | replace('', 'aa') }}",
        "{{ strftime_now('%999999999Y') }}",
        "{% for a in x recursive %}{{ loop(a) }}{% endfor %}",
        "{{ x | map('center', 9) }}",
        "{{ [].append.__class__ }}{{ x.format(9) }}",
    ],
)
def test_templates_that_may_blow_up_are_not(template):
    assert not tame(template)


def run(template, characters=100, items=1, seconds=5.0, **given):
    made = jinja2.Environment().from_string(template)
    with limited(characters, items, seconds):
        return made.render(**given)


def test_limits_let_ordinary_ones_through_and_leave_no_trace():
    before = sys.gettrace()
    assert run("{% for x in xs %}{{ x }}{% endfor %}", xs=["a", "b"]) == "ab"
    lines = "a\n" * 50_000
    template = "{% set ls = x.split('\n') %}{% for l in ls %}{{ l }}{% endfor %}"
    assert len(run(template, characters=len(lines), x=lines)) == 50_000
    with pytest.raises(ZeroDivisionError):
        run("{{ 1 / 0 }}")
    assert sys.gettrace() is before


def test_limits_stop_in_time():
    began = time.monotonic()
    with pytest.raises(TooMuchError, match="it runs for more than 0.2 s"):
        run(
            "{% for a in r %}{% for b in r %}{% endfor %}{% endfor %}", r=range(10**6), seconds=0.2
        )
    assert time.monotonic() - began < 5
    with pytest.raises(TooMuchError, match=f"it makes more than {most_characters(100)} cha"):
        run("{% for a in r %}{{ x }}{% endfor %}", r=range(10**6), x="x" * 1000)


def test_names():
    found = names("{{ messages[0]['name'] }}{% if m.tool_calls %}{{ 'role' }}{% endif %}")
    assert found >= {"messages", "name", "tool_calls", "role", "m"}
    assert names("{% if %}") == frozenset()
