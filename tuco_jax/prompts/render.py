"""Conversations as the text that a chat template makes of them: all of it, or an error.

Nothing that a conversation says is dropped without a word. A template that leaves out a turn, or a
field such as `tool_calls`, is refused for that conversation, and so is one that runs for too long.
What it may leave out is noted (`Renderer.notes`): fields that only say which call a tool's turn
answers, as Qwen's templates do, and the thoughts of earlier turns where it takes those of later
ones, as models that think are trained.
"""

import functools
import json
import re
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from common_jax.errors import InputError
from tuco_jax.prompts.messages import Message, Tool, text_of
from tuco_jax.prompts.template_limits import SECONDS, TooMuchError, limited, names, tame
from tuco_jax.prompts.template_process import TemplateProcess
from tuco_jax.prompts.whole import (
    Piece,
    Talk,
    longer,
    marked,
    pieces,
    said,
    shape,
    without,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Renderer", "render"]

_MARK = "tuxedo"  # a word that no template writes
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_process = functools.cache(TemplateProcess)  # one for all templates that need it


def render(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], **options: Any
) -> str:
    """`Renderer.text` of one conversation."""
    return Renderer(tokenizer).text(messages, **options)


class Renderer:
    """The chat template of a tokenizer.

    notes: what it left out of conversations so far that says nothing by itself.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", template: str | None = None) -> None:
        """template: in place of the tokenizer's own."""
        self._tokenizer, self._template = tokenizer, template
        self._seen: set[int] = set()  # shapes of conversations whose pieces were looked for
        self.notes: list[str] = []

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
        talk = {"messages": found, "tools": [dict(t) for t in tools] if tools else None}
        if continued and not text_of(found[-1]).strip():
            raise InputError(f"messages[{len(found) - 1}] has no text that can be continued")
        text = self._run(talk, opened, continued)
        if whole:
            self._check_whole(text, talk, opened, continued)
        return text

    def warn(self) -> None:
        """Tell the notes as warnings, at the caller's caller."""
        for note in self.notes:
            warnings.warn(note, stacklevel=3)

    def _run(self, talk: Talk, opened: bool, continued: bool) -> str:
        messages, tools = talk["messages"], talk["tools"]
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
            return _process().render(job, characters, SECONDS)
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

    def _check_whole(self, text: str, talk: Talk, opened: bool, continued: bool) -> None:
        """Raise InputError naming the first piece that is not in the text."""
        for turn, message in enumerate(talk["messages"]):
            content = message.get("content")
            if isinstance(content, list) and str(content) in text:
                raise InputError(
                    f"the chat template does not take `messages[{turn}].content` in parts; write "
                    "it as one text"
                )
        template = self._tokenizer.get_chat_template(self._template, talk["tools"])
        kind = hash((template, opened, continued, shape(talk)))
        found = pieces(talk)
        # One may be written here and not there: what a conversation says is looked for in each.
        lacking = [p for p in found if p.is_content and said(talk, p) not in text]
        if kind not in self._seen:
            replaced, marks = marked(talk, found)
            try:
                written = self._run(replaced, opened, continued).lower()
            except InputError:  # it wants to read something: each piece is tried by itself
                written = ""
            # A schema without descriptions has no mark: it is tried by itself.
            lacking += [
                p for p in found if not marks[p] or any(m not in written for m in marks[p])
            ]
        for piece in dict.fromkeys(lacking):
            if self._leaves_out(text, talk, piece, opened, continued):
                self._refuse_or_note(piece, talk, names(template))
        self._seen.add(kind)

    def _leaves_out(
        self, text: str, talk: Talk, piece: Piece, opened: bool, continued: bool
    ) -> bool:
        """Whether the text is the same with another piece, or without it."""
        content = piece.is_content
        other = longer(talk, piece, _MARK) if content else without(talk, piece)
        try:
            return self._run(other, opened, continued) == text
        except InputError:
            return False  # it matters

    def _refuse_or_note(self, piece: Piece, talk: Talk, read: frozenset[str]) -> None:
        if piece.is_content:
            turn = int(piece.path[1])
            raise InputError(
                f"the chat template leaves out `messages[{turn}]`, the "
                f"{talk['messages'][turn]['role']}'s; remove it, or name a template that takes it"
            )
        name = piece.path[-1]
        thoughts = len(piece.path) == 3 and name in _THOUGHTS and name in read
        if not (piece.links or thoughts):
            field = "tools" if piece.path[0] == "tools" else Piece(piece.path[:3]).field
            raise InputError(
                f"the chat template does not take `{field}`; remove it, or name a template that "
                "does"
            )
        kind = re.sub(r"\[\d+\]", "[]", piece.field)
        where = "" if piece.links else " of some turns"
        note = f"the chat template leaves out `{kind}`{where}: the models do not see it"
        if note not in self.notes:
            self.notes.append(note)
