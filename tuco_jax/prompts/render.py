"""Conversations as the text that a chat template makes of them: all of it, or an error.

Nothing of a conversation is dropped without a word. A template that leaves out a turn, or a field
such as `tool_calls`, is refused for that conversation, and so is one that runs for too long.
"""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from common_jax.errors import InputError
from tuco_jax.prompts.messages import Message, Tool, text_of
from tuco_jax.prompts.template_limits import SECONDS, TooMuchError, limited, names, tame
from tuco_jax.prompts.template_process import TemplateProcess

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Renderer", "render"]

_MARK = "tuxedo"  # a word that no template writes


def render(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], **options: Any
) -> str:
    """`Renderer.text` of one conversation."""
    with Renderer(tokenizer) as renderer:
        return renderer.text(messages, **options)


class Renderer:
    """The chat template of a tokenizer. Use as a context."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", template: str | None = None) -> None:
        """template: in place of the tokenizer's own."""
        self._tokenizer, self._template = tokenizer, template
        self._process = TemplateProcess()
        self._taken: set[str] = set()  # roles

    def __enter__(self) -> "Renderer":
        self._process.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.__exit__()

    def text(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool] | None = None,
        opened: bool = False,
        continued: bool = False,
        whole: bool = True,
    ) -> str:
        """The conversation as text.

        opened: followed by what begins an assistant's turn. continued: the last turn is left
        open, to go on with. whole: raise InputError also where the template leaves out any of it.

        Raises InputError, which names the field, for whatever the template does not take.
        """
        found = [{k: v for k, v in m.items() if v is not None} for m in messages]
        functions = [dict(t) for t in tools] if tools else None
        if continued and not text_of(found[-1]).strip():
            raise InputError(f"messages[{len(found) - 1}] has no text that can be continued")
        text = self._run(found, functions, opened, continued)
        if whole:
            self._check_whole(text, found, functions, opened, continued)
        return text

    def _run(
        self, messages: list[Any], tools: list[Any] | None, opened: bool, continued: bool
    ) -> str:
        if not self._tokenizer.chat_template and self._template is None:
            raise InputError("the tokenizer has no chat template, which `messages` need")
        try:
            template = self._tokenizer.get_chat_template(self._template, tools)
            characters = len(json.dumps([messages, tools], ensure_ascii=False))
            if tame(template):
                with limited(characters, len(messages) + len(tools or ()), SECONDS):
                    text = self._tokenizer.apply_chat_template(
                        messages,
                        tools=tools,
                        chat_template=template,
                        tokenize=False,
                        add_generation_prompt=opened,
                        continue_final_message=continued,
                    )
                assert isinstance(text, str)
                return text
            special = {name: str(t) for name, t in self._tokenizer.special_tokens_map.items()}
            job = {
                **special,
                "conversations": [messages],
                "tools": tools,
                "chat_template": template,
                "add_generation_prompt": opened,
                "continue_final_message": continued,
            }
            return self._process.render(job, characters, SECONDS)
        except TooMuchError as error:
            raise InputError(
                f"the chat template is stopped at `messages`: {error}; shorten them, or give a "
                "template that ends"
            ) from None
        except Exception as error:  # whatever a template raises: jinja2's own errors, TypeErrors
            reason = " ".join(str(error).split())
            if len(reason) > 400:
                reason = f"{reason[:400]} ..."
            raise InputError(f"the chat template refuses `messages`: {reason}") from error

    def _check_whole(
        self,
        text: str,
        messages: list[dict[str, Any]],
        tools: list[Any] | None,
        opened: bool,
        continued: bool,
    ) -> None:
        """Raise InputError naming the first turn, or the first field, that is not in the text."""
        read = names(self._tokenizer.get_chat_template(self._template, tools))

        def same(turn: int | None, **changes: Any) -> bool:
            """Whether the text is the same with these fields changed: removed, where None."""
            others = [dict(m) for m in messages]
            if turn is not None:
                others[turn] = {k: v for k, v in (others[turn] | changes).items() if v is not None}
            try:
                functions = tools if turn is not None else None
                return self._run(others, functions, opened, continued) == text
            except InputError:
                return False  # it matters

        if tools and "tools" not in read and same(None):
            raise InputError("the chat template does not take `tools`; remove them, or name one")
        end = 0
        for turn, message in enumerate(messages):
            field = f"messages[{turn}]"
            for name, value in message.items():
                known = name in ("role", "content") or name in read
                if value not in ("", [], {}, False) and not known and same(turn, **{name: None}):
                    raise InputError(
                        f"the chat template does not take `{field}.{name}`; remove it, or name a "
                        "template that does"
                    )
            content = message.get("content")
            if isinstance(content, list) and str(content) in text:
                raise InputError(
                    f"the chat template does not take `{field}.content` in parts; write it as one "
                    "text"
                )
            own, role = text_of(message).strip(), message["role"]
            if not own or (continued and turn == len(messages) - 1):
                continue  # the latter is looked for where it is left open
            at = text.find(own, end)
            end = at + len(own) if at >= 0 else end
            # One look at each role that the template does not name: another text may be like it.
            if at < 0 or not (role in read or role in self._taken):
                self._taken.add(role)
                longer = (
                    [*content, {"type": "text", "text": f" {_MARK}"}]
                    if isinstance(content, list)
                    else f"{content} {_MARK}"
                )
                if same(turn, content=longer):
                    raise InputError(
                        f"the chat template leaves out `{field}`, the {role}'s; remove it, or "
                        "name a template that takes it"
                    )
