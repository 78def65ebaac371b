"""Chat templates for tokenizers that have none: by name, or from a .jinja file.

A pre-trained model's tokenizer often has the tokens that mark turns but no template that writes
them. `gemma` is the format of Gemma 1 to 3 (ai.google.dev/gemma/docs/core/prompt-structure): the
roles are user and model, and a system message becomes the beginning of the first user turn.
`chatml` is OpenAI's, which Qwen and SmolLM use.
"""

import pathlib
from typing import TYPE_CHECKING

from jinja2 import TemplateSyntaxError

from common_jax.errors import InputError
from tuco_jax.prompts.render import Renderer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TEMPLATES", "check_template", "read_template"]

_GEMMA = """\
{%- set system = messages[0]['content'] | trim if messages[0]['role'] == 'system' else '' -%}
{{- bos_token -}}
{%- for message in (messages[1:] if system else messages) -%}
  {%- if message['role'] != ('assistant' if loop.index0 % 2 else 'user') -%}
    {{- raise_exception('user and assistant must take turns, after at most one system message') -}}
  {%- endif -%}
  {{- '<start_of_turn>' + ('model' if loop.index0 % 2 else 'user') + '\\n' -}}
  {{- system + '\\n\\n' if system and loop.first -}}
  {{- message['content'] | trim + '<end_of_turn>\\n' -}}
{%- endfor -%}
{{- '<start_of_turn>model\\n' if add_generation_prompt -}}
"""
_CHATML = """\
{%- for message in messages -%}
  {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
{%- endfor -%}
{{- '<|im_start|>assistant\\n' if add_generation_prompt -}}
"""
TEMPLATES = {"gemma": _GEMMA, "chatml": _CHATML}
_MARKS = {
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "chatml": ("<|im_start|>", "<|im_end|>"),
}
_SAMPLE = ({"role": "user", "content": "hello"}, {"role": "assistant", "content": "welcome"})


def read_template(source: str) -> str:
    """The template of that name, or in that .jinja file. Raises InputError where it is neither."""
    if source in TEMPLATES:
        return TEMPLATES[source]
    if not source.endswith(".jinja"):
        names = ", ".join(TEMPLATES)
        raise InputError(
            f"chat_template: {source!r} is neither a name ({names}) nor a .jinja file"
        )
    try:
        template = pathlib.Path(source).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"chat_template: {source} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"chat_template: {source} is not UTF-8; save it as UTF-8") from None
    if not template.strip():
        raise InputError(f"chat_template: {source} is empty; write a template of `messages`")
    return template


def check_template(source: str, template: str, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raise InputError for a template that fails, drops messages or uses marks that are no tokens.

    source: its name or file, as `read_template` takes it.
    """
    for mark in _MARKS.get(source, ()):
        if mark not in tokenizer.get_vocab():
            raise InputError(
                f"chat_template: {source} marks turns with {mark}, which is no token of the base; "
                "choose another name, or write a .jinja file with tokens that it has"
            )
    try:
        text = Renderer(tokenizer, template).text(_SAMPLE, whole=False)
    except InputError as error:
        cause = error.__cause__
        if isinstance(cause, TemplateSyntaxError):
            raise InputError(
                f"chat_template: {source}:{cause.lineno}: not a Jinja template: {cause.message}"
            ) from None
        if cause is None:
            raise InputError(f"chat_template: {source}: {error}") from None
        reason = " ".join(str(cause).split())
        raise InputError(
            f"chat_template: {source} refuses a user's turn and an answer: {reason}"
        ) from None
    for message in _SAMPLE:
        if message["content"] not in text:
            raise InputError(
                f"chat_template: {source} leaves out what the {message['role']} says; "
                "write each message's content"
            )
