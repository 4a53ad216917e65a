"""A conversation as token ids, and which of them are the model's own words.

The chat template renders the conversation to text once, the text is tokenized once with character offsets,
and the stretches of text that the assistant said become the response mask. Where those stretches stand is
either marked by the template (`{% generation %}`) or proven (see `stages.encoding.spans`); it is never guessed.
"""

import re
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from typing import TYPE_CHECKING, Any

from sstoken.errors import SstokenError
from stages.encoding.messages import BadRow, Conversation, Message
from stages.encoding.spans import Span, close_spans, end_of_turn, find_spans

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN_CHAT_TEMPLATE = (
    "{%- for m in messages -%}"
    "{%- if m['tool_calls'] is defined -%}"
    "{{- raise_exception('tool calls need a chat template; pass one with --chat-template') -}}"
    "{%- endif -%}"
    "{%- set text = (m['content'] or '') | trim -%}"
    "{%- if m['role'] == 'assistant' -%}"
    "{{- 'Assistant: ' -}}{%- generation -%}{{- text + eos_token -}}{%- endgeneration -%}{{- '\\n' -}}"
    "{%- elif m['role'] == 'user' -%}{{- 'User: ' + text + '\\n' -}}"
    "{%- elif m['role'] == 'tool' -%}{{- 'Tool: ' + text + '\\n' -}}"
    "{%- else -%}{{- text + '\\n\\n' -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'Assistant:' -}}{%- endif -%}"
)
"""For a tokenizer without a chat template: a system text and a blank line, then `User: ...` and
`Assistant: ...` lines, an assistant turn closed by the EOS token. With a BOS token in front where the
tokenizer itself puts one."""

TEMPLATE_DATE = date(2024, 7, 26)
"""Some templates print today's date; theirs is this one, so that a run gives the same tokens on any day."""
DEFAULT_MAX_LENGTH = 4096
_SANE_MAX_LENGTH = 1_000_000
_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
_TODAY = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")


@dataclass(frozen=True)
class Encoded:
    """One example. Ends with its last response token; empty when truncation left no response token."""

    input_ids: list[int]
    response_mask: list[bool]
    """As long as `input_ids`: assistant turns, each with its end-of-turn token."""
    truncated: bool
    """Response tokens beyond the maximal length were cut off."""


class ChatEncoder:
    """Encodes conversations with one tokenizer and one chat template.

    Args:
        tokenizer: a fast one.
        max_length: in tokens; None: what the tokenizer declares, or 4096 where that is no real limit.
        chat_template: Jinja text instead of the tokenizer's own.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        max_length: int | None = None,
        chat_template: str | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        declared = int(min(tokenizer.model_max_length, _SANE_MAX_LENGTH))
        self.max_length = max_length or (declared if declared < _SANE_MAX_LENGTH else DEFAULT_MAX_LENGTH)
        self._override = chat_template
        self._ends: dict[str, str | None] = {}

    def template(self, tools: list[dict[str, Any]] | None = None) -> str:
        """The Jinja text in use (a tokenizer may have another one for conversations with tools)."""
        if self._override is not None:
            return self._override
        if self.tokenizer.chat_template is None:
            return ("{{- bos_token -}}" if self._adds_bos else "") + PLAIN_CHAT_TEMPLATE
        try:
            return str(self.tokenizer.get_chat_template(None, tools))
        except ValueError as error:  # several templates, none the default
            raise SstokenError(
                f"chat template: {str(error).splitlines()[0]}; name one with --chat-template"
            ) from error

    def encode_conversation(self, conversation: Conversation) -> Encoded:
        """As `encode`, of what `to_conversation` gives."""
        return self.encode(conversation.messages, conversation.tools)

    def encode(self, messages: list[Message], tools: list[dict[str, Any]] | None = None) -> Encoded:
        """Token ids and response mask of a conversation.

        Token 0 is never a response token: nothing predicts it. What follows the last response token carries
        nothing and is left out. A conversation longer than `max_length` keeps its start.

        Raises:
            BadRow: the template refuses the conversation, or what is response cannot be proven.
            SstokenError: the template ends no assistant turn with a token of its own.
        """
        text, spans = self.render(messages, tools)
        coded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        mask = _token_mask(text, spans, coded["offset_mapping"])
        if mask:
            mask[0] = False
        end = _length_to_last(mask)
        kept = _length_to_last(mask[: self.max_length])
        return Encoded(list(coded["input_ids"][:kept]), mask[:kept], end > self.max_length)

    def render(
        self, messages: list[Message], tools: list[dict[str, Any]] | None = None
    ) -> tuple[str, list[Span]]:
        """The conversation as text, and the `(start, end)` characters of each response in it.

        Raises:
            BadRow, SstokenError: as `encode`.
        """
        template = self.template(tools)
        end = self._end_of_turn(template)
        if _MARKER.search(template):
            text, marked = self._fill(template, messages, tools, marked=True)
            spans = close_spans(text, marked, end)
            if not spans:
                raise BadRow("uncertain mask", "the template marks no text of this conversation as generated")
            return text, spans
        if end is None:
            raise SstokenError(
                "chat template: it ends an assistant turn with no special token, so nothing shows where a "
                "response ends; pass a --chat-template that has {% generation %} markers or an end-of-turn token"
            )

        def fill(messages: list[Message], prompt: bool = False) -> str:
            return self._fill(template, messages, tools, prompt=prompt)[0]

        return find_spans(messages, fill, end)

    @cached_property
    def _adds_bos(self) -> bool:
        ids = self.tokenizer("a", verbose=False)["input_ids"]
        return self.tokenizer.bos_token_id is not None and ids[:1] == [self.tokenizer.bos_token_id]

    def _end_of_turn(self, template: str) -> str | None:
        """The token that closes an assistant turn, learned once per template."""
        if template not in self._ends:
            added = {str(token) for token in self.tokenizer.added_tokens_decoder.values()}
            tokens = added | set(self.tokenizer.all_special_tokens)
            self._ends[template] = end_of_turn(lambda m: self._fill(template, m, None)[0], tokens)
        return self._ends[template]

    def _fill(
        self,
        template: str,
        messages: list[Message],
        tools: list[dict[str, Any]] | None,
        *,
        prompt: bool = False,
        marked: bool = False,
    ) -> tuple[str, list[Span]]:
        """The template's text, and the characters it marks as generated if `marked`."""
        import jinja2
        from transformers.utils.chat_template_utils import render_jinja_template

        dated = _TODAY.sub(lambda call: repr(TEMPLATE_DATE.strftime(call[2])), template)
        try:
            texts, spans = render_jinja_template(
                conversations=[messages],
                tools=tools,
                chat_template=dated,
                return_assistant_tokens_mask=marked,
                add_generation_prompt=prompt,
                **self.tokenizer.special_tokens_map,
            )
        except jinja2.TemplateSyntaxError as error:
            raise SstokenError(
                f"chat template: not valid Jinja (line {error.lineno}: {error.message})"
            ) from error
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise BadRow("template refuses", reason) from error
        return texts[0], [(start, end) for start, end in spans[0]] if marked else []


def _token_mask(text: str, spans: list[Span], offsets: list[Span]) -> list[bool]:
    """Which tokens lie in the spans; both are sorted.

    A token that crosses a border belongs to the side where it has more than whitespace.
    """
    mask = [False] * len(offsets)
    todo = iter(spans)
    span = next(todo, None)
    for i, (start, end) in enumerate(offsets):
        while span is not None and span[1] <= start:
            span = next(todo, None)
        if span is None:
            break
        if span[0] <= start and end <= span[1]:
            mask[i] = True
        elif span[0] < end:
            inside = text[max(start, span[0]) : min(end, span[1])].strip()
            outside = (text[start : span[0]] + text[span[1] : end]).strip()
            if inside and outside:
                raise BadRow(
                    "uncertain mask", f"the token {text[start:end]!r} holds prompt and response alike"
                )
            mask[i] = not outside
    return mask


def _length_to_last(mask: list[bool]) -> int:
    """How many tokens up to and with the last response token."""
    return next((i + 1 for i in range(len(mask) - 1, -1, -1) if mask[i]), 0)
