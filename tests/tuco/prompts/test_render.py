"""What a template does not take is refused, never dropped; what it takes reaches it."""

import time

import pytest

from common_jax.errors import InputError
from tests.tuco.tiny import tiny_tokenizer
from tuco_jax.prompts.render import Renderer, _process, render
from tuco_jax.prompts.template_limits import tame

USER = {"role": "user", "content": "What is 2 + 2?"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
# As Qwen's: developers are unknown to it, tools and calls are not.
TAKES = """\
{%- if tools %}{% for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}
{%- for m in messages %}
{%- if m.role == 'user' or m.role == 'system' -%}
<|{{ m.role }}{{ ':' + m.name if m.name else '' }}|>
{%- if m.content is string %}{{ m.content }}
{%- else %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}
{%- elif m.role == 'assistant' -%}
<|assistant|>{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}
{%- if m.tool_calls %}{% for c in m.tool_calls %}{{ c.function.name }}
{{- c.function.arguments | tojson }}{% endfor %}{% else %}{{ m.content }}{% endif %}
{%- elif m.role == 'tool' -%}
<|tool|>{{ m.content }}
{%- endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"""


def tokenizer(template=TAKES):
    found = tiny_tokenizer()
    found.chat_template = template
    return found


def test_what_it_takes_reaches_it():
    talk = [
        USER | {"name": "Ann"},
        {"role": "assistant", "reasoning_content": "hm", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "4", "tool_call_id": None},
        {"role": "user", "content": [{"type": "text", "text": "Sure"}, {"text": "?"}]},
    ]
    text = render(tokenizer(), talk, tools=[TOOL], opened=True)
    for part in (":Ann", "<think>hm", 'add{"a": 2, "b": 2}', "<|tool|>4", "Sure?", '"parameters"'):
        assert part in text
    assert text.endswith("<|assistant|>")


@pytest.mark.parametrize(
    ("talk", "message"),
    [
        (
            [{"role": "developer", "content": "Be brief."}, USER],
            r"leaves out `messages\[0\]`, the",
        ),
        ([USER | {"weight": 3}], r"does not take `messages\[0\].weight`; remove it"),
        (
            [USER, {"role": "assistant", "content": "I add.", "tool_calls": [CALL]}],
            r"leaves out `messages\[1\]`, the assistant's",
        ),
        ([USER | {"name": "Ann"}, {"role": "assistant", "content": "Hi", "name": "Bo"}], r"1\].n"),
        (
            [{"role": "system", "content": "is 2"}, USER | {"role": "developer"}],
            r"`messages\[1\]`",
        ),
    ],
)
def test_what_it_leaves_out_is_refused(talk, message):
    with pytest.raises(InputError, match=message):
        render(tokenizer(), talk)
    assert render(tokenizer(), talk, whole=False)


PLAIN = str(tiny_tokenizer().chat_template)


def test_a_plain_template_takes_texts_alone():
    plain = tokenizer(PLAIN)
    for fields in ({"name": "Ann"}, {"reasoning_content": "hm"}, {"tool_calls": [CALL]}):
        with pytest.raises(InputError, match=f"does not take .*{next(iter(fields))}`"):
            render(plain, [USER | fields])
    with pytest.raises(InputError, match="does not take `tools`"):
        render(plain, [USER], tools=[TOOL])
    parts = [{"type": "text", "text": "a"}]
    with pytest.raises(InputError, match=r"take `messages\[0\].content` in parts; write it as"):
        render(plain, [{"role": "user", "content": parts}])
    empty = USER | {"name": "", "tool_calls": []}
    assert render(plain, [empty]) == render(plain, [USER])
    for role in ("developer", "tool", "system"):  # it writes whatever role there is
        assert f"<|{role}|>hi" in render(plain, [{"role": role, "content": "hi"}])


def test_a_template_may_change_a_text():
    """Trimmed, in capitals, or without what was thought: not as it stands, but there."""
    for template in (
        "{% for m in messages %}{{ m.content | trim | upper }}{% endfor %}",
        "{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}",
    ):
        text = render(tokenizer(template), [{"role": "user", "content": " <think>a</think>b "}])
        assert "b" in text.lower()


LOOPS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "loops over messages": "{% for a in range(99999) %}"
    "{% for b in messages %}{% for c in range(99999) %}{% if c %}{% endif %}"
    "{% endfor %}{% endfor %}{% endfor %}",
    "doubles": "{% set n = namespace(x='aaaaaaaa') %}{% for a in range(99) %}"
    "{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}",
    "doubles by lines": "{% set a = 'aaaaaaaa' %}" + "{% set a = a ~ a %}" * 60 + "{{ a }}",
    "lists": "{% set a = ['a'] %}" + "{% set a = a + a %}" * 60 + "{{ a }}",
    "writes": "{% for a in range(99999) %}{% for b in range(99999) %}"
    "{{ messages }}{% endfor %}{% endfor %}",
    "nests": "{% set a = 'a' %}" + "{% set a = [a, a] %}" * 60 + "{{ a }}",
    "multiplies": "{{ 'a' * 99999999999 }}",
    "powers": "{{ 9 ** (9 ** 9) }}",
    "formats": "{{ '%99999999999d' % 3 }}",
    "centers": "{{ 'a' | center(99999999999) }}",
    "justifies": "{{ 'a'.ljust(99999999999) }}",
    "indents": "{{ messages | tojson(indent=99999999999) }}",
    "replaces": "{% set a = 'a' * 9999 %}" + "{% set a = a | replace('a', a) %}" * 9 + "{{ a }}",
    "macros": "{% macro m(x) %}{{ x }}{{ x }}{% endmacro %}"
    + "{{ " + "m(" * 60 + "'a'" + ")" * 60 + " }}",
    "recurses": "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
    "lorem": "{{ lipsum(99999999) }}",
    "joins": "{{ range(99999) | map('string') | join(messages[0].content * 9999) }}",
}  # fmt: skip


@pytest.mark.parametrize("name", LOOPS)
def test_a_template_that_would_take_all_is_stopped(name, monkeypatch):
    """By time, or by what it makes: in this process if each of its steps is small, else in one."""
    import tuco_jax.prompts.render as module

    monkeypatch.setattr(module, "SECONDS", 1.0)
    began = time.monotonic()
    with pytest.raises(InputError, match="the chat template (is stopped at|refuses) `messages`: "):
        render(tokenizer(LOOPS[name]), [USER])
    assert time.monotonic() - began < 30  # a process takes seconds to start


# As Qwen 3's in what it leaves out: ids, names, and thoughts before the last question.
QWEN = """\
{%- set ns = namespace(last=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- for m in messages %}
{%- if m.role == 'system' and not loop.first %}{# only the first #}
{%- else -%}
<|{{ m.role }}|>{% if m.reasoning_content and loop.index0 > ns.last -%}
<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}
{%- for c in m.tool_calls or () %}{{ c.function.name }}
{{- c.function.arguments | tojson }}{% endfor %}
{%- endif %}{% endfor %}"""
CALLS = {"role": "assistant", "content": "", "tool_calls": [CALL | {"id": "call00001"}]}
ANSWERS = {"role": "tool", "content": "4", "tool_call_id": "call00001", "name": "add"}


def test_what_only_links_turns_is_noted_once():
    renderer = Renderer(tokenizer(QWEN))
    thought = {"role": "assistant", "content": "So.", "reasoning_content": "hm"}
    for _ in range(2):
        renderer.text([USER, thought, USER, CALLS, ANSWERS])
    assert renderer.notes == [
        "the chat template leaves out `messages[].reasoning_content` of some turns: the models "
        "do not see it",
        "the chat template leaves out `messages[].tool_calls[].id`: the models do not see it",
        "the chat template leaves out `messages[].tool_call_id`: the models do not see it",
        "the chat template leaves out `messages[].name`: the models do not see it",
    ]
    read = Renderer(tokenizer(QWEN + "{{ messages }}"))
    assert read.text([USER, thought, USER, CALLS, ANSWERS]) and not read.notes
    with pytest.raises(InputError, match=r"does not take `messages\[0\].name`"):  # who speaks
        renderer.text([USER | {"name": "Ann"}])
    with pytest.raises(InputError, match="does not take .*.reasoning_content`"):
        render(tokenizer(PLAIN), [USER, thought])


@pytest.mark.parametrize("content", ["2 + 2", "no such words"])
def test_a_turn_is_looked_for_itself_and_not_its_words(content):
    """Those may stand in another turn."""
    system = {"role": "system", "content": content}
    for talk in ([USER, system], [USER, system, USER]):
        with pytest.raises(InputError, match=r"leaves out `messages\[1\]`, the system's"):
            render(tokenizer(QWEN), talk)
    assert render(tokenizer(QWEN), [system, USER]).count("2 + 2") == 1 + (content == "2 + 2")


def test_pieces_of_a_turn_are_looked_for_one_by_one():
    first = "{% for m in messages %}{{ m.content[0].text }}{% endfor %}"
    parts = [{"type": "text", "text": word} for word in ("a", "a")]
    with pytest.raises(InputError, match=r"leaves out `messages\[0\]`, the user's"):
        render(tokenizer(first), [{"role": "user", "content": parts}])
    names = QWEN.replace("{{- c.function.arguments | tojson }}", "")
    with pytest.raises(InputError, match=r"take `messages\[1\].tool_calls`"):
        render(tokenizer(names), [USER, CALLS])
    one_tool = "{{ tools[0] }}{% for m in messages %}{{ m.content }}{% endfor %}"
    assert render(tokenizer(one_tool), [USER], tools=[TOOL])
    with pytest.raises(InputError, match="does not take `tools`"):
        render(tokenizer(one_tool), [USER], tools=[TOOL, TOOL])


SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
WEATHER = {"name": "weather", "description": "Of a city.", "parameters": SCHEMA}


@pytest.mark.parametrize("described", [False, True])
@pytest.mark.parametrize(
    ("written", "taken"),
    [
        ("tool.function.name", False),
        ("tool.function.name }}{{ tool.function.description", False),
        ("tool.function.name }}{{ tool.function.parameters", False),
        ("tool.function.description }}{{ tool.function.parameters", False),
        ("tool.function.name }}{{ tool.function.description }}{{ tool.function.parameters", True),
        ("tool | tojson(indent=4)", True),  # as Llama's and Qwen's
        (  # as Mistral's
            "tool.type }}{% for k, v in tool.function.items() if k != 'return' %}{{ k }}: "
            "{{ v if v is string else v | tojson }}{% endfor %}{{ ''",
            True,
        ),
        ("tool.function | upper", True),
    ],
)
def test_all_that_describes_a_tool_is_looked_for(written, taken, described):
    """Its schema, too, with descriptions in it or without."""
    tools = f"{{% for tool in tools or [] %}}[{{{{ {written} }}}}]{{% endfor %}}"
    city = {"type": "string"} | ({"description": "Its name."} if described else {})
    schema = {"type": "object", "properties": {"city": city}}
    tool = {"type": "function", "function": WEATHER | {"parameters": schema}}
    own = Renderer(tokenizer(tools + "{% for m in messages %}{{ m.content }}{% endfor %}"))
    if taken:
        assert own.text([USER], tools=[tool])
        return
    with pytest.raises(InputError, match="the chat template does not take `tools`; remove it"):
        own.text([USER], tools=[tool])


def test_a_schema_of_no_parameters_may_be_left_out():
    named = "{{ tools[0].function.name }}{{ messages[0].content }}"
    for schema in ({"type": "object"}, {"type": "object", "properties": {}, "required": []}):
        tool = {"type": "function", "function": {"name": "now", "parameters": schema}}
        assert render(tokenizer(named), [USER], tools=[tool])


@pytest.mark.parametrize("unit", ["F", 3, ["F"], {"name": "F"}])
def test_each_argument_of_a_call_is_looked_for(unit):
    call = {"name": "weather", "arguments": {"city": "Oslo", "thinking": unit}}
    talk = [USER, CALLS | {"tool_calls": [{"type": "function", "function": call}]}]
    city = QWEN.replace("arguments | tojson", "arguments.city")
    with pytest.raises(InputError, match=r"take `messages\[1\].tool_calls`; remove it"):
        render(tokenizer(city + "{# thinking #}{{ messages[0].thinking }}"), talk)
    assert render(tokenizer(QWEN), talk)
    each = "{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }}{% endfor %}"
    items = QWEN.replace("{{- c.function.arguments | tojson }}", each)
    assert render(tokenizer(items), talk)


def test_pieces_are_looked_for_once_a_shape(monkeypatch):
    runs = []
    run = Renderer._run
    monkeypatch.setattr(Renderer, "_run", lambda *args: runs.append(0) or run(*args))
    renderer = Renderer(tokenizer(TAKES))
    for word in ("one", "two", "three"):
        renderer.text([USER, {"role": "assistant", "content": word}])
    assert len(runs) == 3 + 1
    renderer.text([USER, {"role": "system", "content": "four"}])
    assert len(runs) == 5 + 1


def test_ids_may_have_to_be_nine_characters():
    """As Mistral's templates want them."""
    strict = QWEN + (
        "{% for m in messages %}{% if m.tool_call_id and m.tool_call_id | length != 9 %}"
        "{{ raise_exception('nine') }}{% endif %}{{ m.tool_call_id }}{% endfor %}"
    )
    renderer = Renderer(tokenizer(strict))
    renderer.text([USER, CALLS, ANSWERS])
    assert "tool_call_id" not in str(renderer.notes)


def test_many_conversations_share_a_process():
    template = (
        "{{ '=' * 3 }}{{ messages[0].content }}{{ bos_token }}{{ raise_exception('no') if "
        "messages[0].content == 'bad' }}"
    )
    assert not tame(template)
    found = set()
    for word in ("a", "ü\n", "a"):
        message = {"role": "user", "content": word}
        assert render(tokenizer(template), [message], whole=False) == f"==={word}<s>"
        found.add(_process()._process)
    with pytest.raises(InputError, match="the chat template refuses `messages`: no$"):
        render(tokenizer(template), [{"role": "user", "content": "bad"}])
    assert found == {_process()._process} != {None}
