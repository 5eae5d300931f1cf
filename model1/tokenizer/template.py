"""Chat templates: a conversation to text, with message contents kept apart from template text.

Contents are never parsed for special tokens, whatever they hold. What a template may do is in
`model1.tokenizer.sandbox`.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

from model1.errors import TokenizerError
from model1.tokenizer.sandbox import CompiledTemplate

ROLES = ("system", "user", "assistant")

# characters that a template may add to its messages: this many, and this many per message
_BUDGET_BASE = 16_384
_BUDGET_PER_MESSAGE = 256


class Segment(NamedTuple):
    """A stretch of rendered text; `trusted` text comes from the template, not from a message."""

    text: str
    trusted: bool


class ChatTemplate:
    """One chat template in Jinja, compiled at first use, so that only chat needs Jinja."""

    def __init__(self, source: str) -> None:
        self.source = source

    def render(
        self, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool
    ) -> list[Segment]:
        """The conversation in order, as stretches of template text and of message content.

        Each message has the keys role (system, user or assistant) and content, both text. A
        template sees each content between two private marks and must pass both on unchanged.
        Raises TokenizerError on any other message, on a template that breaks the sandbox's
        rules or alters a content, and if the output exceeds the size budget.
        """
        _check_messages(messages)
        # nobody can guess the marks, so a content cannot pretend to end early
        nonce = secrets.token_hex(16)
        opening, closing = f"\ue000{nonce}(", f"\ue000{nonce})"
        wrapped = [{**m, "content": f"{opening}{m['content']}{closing}"} for m in messages]
        budget = _BUDGET_BASE + sum(len(m["content"]) + _BUDGET_PER_MESSAGE for m in wrapped)
        variables = {"messages": wrapped, "add_generation_prompt": add_generation_prompt}
        text = self._compiled.render(variables, max_chars=budget)
        return _split_segments(text, opening, closing)

    @cached_property
    def _compiled(self) -> CompiledTemplate:
        return CompiledTemplate(self.source)


def _check_messages(messages: Sequence[dict[str, str]]) -> None:
    if not messages:
        raise TokenizerError("messages must not be empty")
    for place, message in enumerate(messages):
        if set(message) != {"role", "content"}:
            raise TokenizerError(
                f"messages[{place}] must have exactly the keys role and content, "
                f"got {sorted(message)}"
            )
        if message["role"] not in ROLES:
            raise TokenizerError(
                f"messages[{place}] role must be one of {ROLES}, got {message['role']!r}"
            )
        if not isinstance(message["content"], str):
            kind = type(message["content"]).__name__
            raise TokenizerError(f"messages[{place}] content must be text, got {kind}")


def _split_segments(text: str, opening: str, closing: str) -> list[Segment]:
    nonce = opening[:-1]
    segments: list[Segment] = []
    parts = re.split(f"{re.escape(opening)}(.*?){re.escape(closing)}", text, flags=re.DOTALL)
    for place, part in enumerate(parts):
        is_content = place % 2 == 1  # re.split puts what the group caught at odd places
        if nonce[1:] in part.lower():
            raise TokenizerError("chat template alters a message content; it must pass it on whole")
        if part:
            segments.append(Segment(part, trusted=not is_content))
    return segments
