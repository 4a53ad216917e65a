"""A conversation as token ids, and which of them are the model's own words.

The chat template renders the conversation to text once, the text is tokenized once with character offsets, and the
stretches of text that the assistant said become the response mask. Every piece of text of the conversation is accounted
for in the rendering: what the template leaves out makes the row a bad one, unless the user allows it.
"""

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from sstoken.errors import SstokenError
from stages.encoding.messages import BadRow, Conversation, TrainedTurns
from stages.encoding.scaffolds import Scaffolds
from stages.encoding.spans import Turn, TurnFinder
from stages.encoding.templates import (
    PLAIN_CHAT_TEMPLATE,
    ChatTemplate,
    Span,
    read_template,
    training_variant,
)
from stages.encoding.tracing import SPLIT, TEMPLATE, TOOLS, Piece, Trace, missing, pieces

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_MAX_LENGTH = 4096
_SANE_MAX_LENGTH = 1_000_000
NO_END = "responses that no token ends"
UNMARKED = "assistant turns that the chat template does not mark as generated"
EARLIER_REASONING = "examples whose earlier turns are shown without their reasoning, as at inference"
SPECIAL_KEPT = "examples with special tokens in their text"


@dataclass(frozen=True)
class Encoded:
    """One example. Ends with its last response token; empty when truncation left no response token."""

    input_ids: list[int]
    response_mask: list[bool]
    """As long as `input_ids`: assistant turns, each with its end-of-turn token."""
    truncated: bool
    """Response tokens beyond the maximal length were cut off."""
    turn: int | None = None
    """The message that it trains, counted from 1, where each turn is an example; None: all of them."""
    notes: tuple[str, ...] = ()
    """What has to be counted and said of it."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as text."""

    text: str
    spans: list[Span]
    """Start and end of each response in characters, the end excluded; sorted."""
    notes: tuple[str, ...] = ()


class ChatEncoder:
    """Encodes conversations with one tokenizer and one chat template.

    Args:
        tokenizer: a fast one.
        max_length: in tokens; None: what the tokenizer declares, or 4096 where that is no real limit.
        chat_template: Jinja text instead of the tokenizer's own.
        turns: which assistant turns are responses: `all` in one example, the `last`, or `each` in an example of its
            own, rendered as inference would see it.
        allow_lost: what the template may leave out.
        keep_special_tokens: take rows whose text holds special tokens.
        stop_tokens: on which generation stops, besides EOS.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        max_length: int | None = None,
        chat_template: str | None = None,
        *,
        turns: TrainedTurns = "all",
        allow_lost: Collection[str] = (),
        keep_special_tokens: bool = False,
        stop_tokens: Collection[str] = (),
    ) -> None:
        self.tokenizer = tokenizer
        declared = int(min(tokenizer.model_max_length, _SANE_MAX_LENGTH))
        self.max_length = max_length or (declared if declared < _SANE_MAX_LENGTH else DEFAULT_MAX_LENGTH)
        self._override = chat_template
        self._turns = turns
        self._allow_lost = frozenset(allow_lost)
        self._keep_special_tokens = keep_special_tokens
        self._stop_tokens = frozenset({str(tokenizer.eos_token), *stop_tokens})
        self._finders: dict[str, tuple[TurnFinder, Scaffolds]] = {}
        self._ways_out: dict[tuple[str, frozenset[str]], str] = {}
        self._suggest = True

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

    def encode(self, conversation: Conversation) -> list[Encoded]:
        """Token ids and response masks of a conversation: one example, or several where each turn is one.

        Token 0 is never a response token: nothing predicts it. What follows the last response token carries
        nothing and is left out. An example longer than `max_length` keeps its start.

        Raises:
            BadRow: the template refuses the conversation or loses text of it, its text holds special tokens, or what is
                response is not certain.
        """
        notes = self._special_tokens_in(conversation)
        examples = []
        for turn, rendered in self._examples(conversation):
            examples.append(self._tokenize(rendered, turn, notes))
        return examples

    def render(self, conversation: Conversation) -> Rendered:
        """The whole conversation as text, and where its responses stand.

        Raises:
            BadRow: as `encode`.
        """
        finder, scaffolds = self._finder(conversation)
        template = finder.template
        if template.marks_responses:
            text, marked = template.render_marked(conversation)
        else:
            text, marked = template.render(conversation), None
        wanted = _trained(conversation)
        notes: list[str] = []
        turns = scaffolds.recognise(text, conversation)
        if turns is None:
            found = finder.trace(conversation, text)
            lost = self._check_lost(missing(found, conversation, template.protected), conversation)
            notes += [f"examples whose {kind} the chat template leaves out" for kind in lost]
            answers = [i for i, m in enumerate(conversation.messages) if m["role"] == "assistant"]
            try:
                turns = finder.turns(found, conversation, answers if not lost else wanted)
            except BadRow as error:
                if error.reason != SPLIT:
                    raise
                raise BadRow(SPLIT, f"{error.detail}; {self._way_out(conversation)}") from error
            if marked is not None:
                _check_marks(marked, found, turns)
            if not lost:
                scaffolds.learn(found, conversation, turns)
        spans = []
        for turn in turns:
            if turn.message in wanted:
                own, said = _spans(turn, marked)
                spans += own
                notes += said
        if not spans:
            raise BadRow("uncertain mask", "the template marks no text of this conversation as generated")
        return Rendered(text, spans, tuple(notes))

    def _examples(self, conversation: Conversation) -> Iterator[tuple[int | None, Rendered]]:
        wanted = _trained(conversation)
        if self._turns == "all":
            yield None, self.render(conversation)
            return
        for index in wanted if self._turns == "each" else wanted[-1:]:
            yield index + 1, self._render_turn(conversation, index)

    def _render_turn(self, conversation: Conversation, index: int) -> Rendered:
        """One turn after the prompt that the model is given for it at inference."""
        finder, _ = self._finder(conversation)
        protected = finder.template.protected
        until = replace(conversation, messages=conversation.messages[: index + 1])
        before = replace(conversation, messages=conversation.messages[:index])
        prompt, found = finder.prompt(conversation, index), finder.trace(until)
        unseen = missing(prompt, before, protected)
        earlier = [p for p in unseen if p.kind == "reasoning" and p.owner != TOOLS]
        lost = [p for p in unseen if p not in earlier]
        lost += [p for p in missing(found, until, protected) if p.owner == index + 1]
        kinds = self._check_lost(lost, until)
        notes = [f"examples whose {kind} the chat template leaves out" for kind in kinds]
        notes += [EARLIER_REASONING] if earlier else []
        [turn] = finder.turns(found, until, [index])
        marked = finder.template.render_marked(until)[1] if finder.template.marks_responses else None
        spans, said = _spans(turn, marked)
        if not spans:
            raise BadRow("uncertain mask", f"the template does not mark turn {index + 1} as generated")
        head = prompt.text[: prompt.before(len(prompt.text))]
        moved = len(head) - found.before(turn.first)
        return Rendered(
            head + found.text[found.before(turn.first) : turn.stop],
            [(start + moved, stop + moved) for start, stop in spans],
            (*notes, *said),
        )

    def _tokenize(self, rendered: Rendered, turn: int | None, notes: tuple[str, ...]) -> Encoded:
        coded = self.tokenizer(
            rendered.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        ids = coded["input_ids"]
        mask = _token_mask(rendered.text, rendered.spans, coded["offset_mapping"])
        self._check_tokens(ids, mask, rendered)
        if mask:
            mask[0] = False
        end = _length_to_last(mask)
        kept = _length_to_last(mask[: self.max_length])
        return Encoded(list(ids[:kept]), mask[:kept], end > self.max_length, turn, (*notes, *rendered.notes))

    def _check_tokens(self, ids: list[int], mask: list[bool], rendered: Rendered) -> None:
        """Refuse an example whose response tokens do not spell its responses."""
        at = 0
        said = []
        while at < len(mask):
            try:
                start = mask.index(True, at)
            except ValueError:
                break
            at = mask.index(False, start) if False in mask[start:] else len(mask)
            said.append(self._decode(ids[start:at]))
        expected = "".join(rendered.text[start:stop] for start, stop in rendered.spans)
        found = "".join(said)
        if found == expected or _without_spaces(found) == _without_spaces(expected):
            return
        normalizer = self.tokenizer.backend_tokenizer.normalizer
        if normalizer is not None:
            expected = normalizer.normalize_str(expected)
            found = normalizer.normalize_str(found)
        if _without_spaces(found) != _without_spaces(expected):
            raise BadRow(
                "changed by the tokenizer",
                f"the response tokens spell {found[:40]!r}, the text is {expected[:40]!r}",
            )

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False))

    def _check_lost(self, lost: Sequence[Piece], conversation: Conversation) -> list[str]:
        """The kinds of text that the template leaves out, all of them allowed.

        Raises:
            BadRow: one is not allowed, or nothing of a turn is left.
        """
        if not lost:
            return []
        kinds = sorted({piece.kind.partition(" ")[0] for piece in lost})
        if refused := [p for p in lost if p.kind.partition(" ")[0] not in self._allow_lost]:
            parts = dict.fromkeys(
                p.kind if p.owner == TOOLS else f"{p.kind} of turn {p.owner}" for p in refused
            )
            way_out = self._way_out(conversation, frozenset(p.kind.partition(" ")[0] for p in refused))
            raise BadRow("lost by the template", f"{', '.join(parts)}; {way_out}")
        for index in _trained(conversation):
            own = {p.text for p in pieces(conversation) if p.owner == index + 1}
            if own <= {p.text for p in lost if p.owner == index + 1}:
                raise BadRow(
                    "lost by the template", f"all of turn {index + 1}: its response would be a bare end token"
                )
        return kinds

    def _way_out(self, conversation: Conversation, kinds: frozenset[str] = frozenset()) -> str:
        """What the user can do about text that is lost or split; each way is tried on this conversation.

        Once for each kind of loss: later rows are told the same.
        """
        source = self.template(conversation.tools)
        key = (source, kinds)
        if not self._suggest:
            return ""
        if key in self._ways_out:
            return self._ways_out[key]
        ways = []
        if self._turns == "all" and self._takes(conversation, source, "each"):
            ways.append("--turns each")
        variant = training_variant(source)
        if variant is not None and self._takes(conversation, read_template(variant), self._turns):
            ways.append(f"--chat-template {variant}")
        if kinds and self._takes(conversation, source, self._turns, kinds):
            ways.append(" ".join(f"--allow-lost {kind}" for kind in sorted(kinds)))
        self._ways_out[key] = f"take {', or '.join(ways or ['a --chat-template that prints it whole'])}"
        return self._ways_out[key]

    def _takes(
        self,
        conversation: Conversation,
        source: str,
        turns: TrainedTurns,
        allow_lost: frozenset[str] = frozenset(),
    ) -> bool:
        other = ChatEncoder(
            self.tokenizer,
            self.max_length,
            source,
            turns=turns,
            allow_lost=self._allow_lost | allow_lost,
            keep_special_tokens=True,
            stop_tokens=self._stop_tokens,
        )
        other._suggest = False
        try:
            return all(rendered.spans for _, rendered in other._examples(conversation))
        except (BadRow, SstokenError):
            return False

    def _special_tokens_in(self, conversation: Conversation) -> tuple[str, ...]:
        if self._specials is None:
            return ()
        for index, message in enumerate(conversation.messages):
            for key in ("content", "reasoning_content"):
                match = self._specials.search(message.get(key) or "")
                if match and self._keep_special_tokens:
                    return (SPECIAL_KEPT,)
                if match:
                    raise BadRow(
                        "special token in the text",
                        f"turn {index + 1} holds {match[0]!r}; remove it, or take it with --keep-special-tokens",
                    )
        return ()

    @cached_property
    def _specials(self) -> re.Pattern[str] | None:
        added = {str(t) for t in self.tokenizer.added_tokens_decoder.values() if t.special}
        tokens = {t for t in added | set(self.tokenizer.all_special_tokens) if len(t) > 2}
        return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))) if tokens else None

    @cached_property
    def _adds_bos(self) -> bool:
        ids = self.tokenizer("a", verbose=False)["input_ids"]
        return self.tokenizer.bos_token_id is not None and ids[:1] == [self.tokenizer.bos_token_id]

    def _finder(self, conversation: Conversation) -> tuple[TurnFinder, Scaffolds]:
        source = self.template(conversation.tools)
        if source not in self._finders:
            added = {str(token) for token in self.tokenizer.added_tokens_decoder.values()}
            special = added | set(self.tokenizer.all_special_tokens)
            template = ChatTemplate(source, self.tokenizer.special_tokens_map)
            self._finders[source] = TurnFinder(template, special, self._stop_tokens), Scaffolds()
        return self._finders[source]


def _trained(conversation: Conversation) -> list[int]:
    """The messages that are to be trained on."""
    answers = [i for i, m in enumerate(conversation.messages) if m["role"] == "assistant"]
    trained = [i for i in answers if i not in conversation.untrained]
    if not trained:
        raise BadRow("no answer", "every assistant turn is marked as not to be trained on")
    return trained


def _check_marks(marked: list[Span], found: Trace, turns: Sequence[Turn]) -> None:
    """Refuse marks around what the assistant did not say."""
    said = [TEMPLATE, *(turn.message + 1 for turn in turns)]
    for start, stop in marked:
        for owner in set(found.owners[start:stop].tolist()) - set(said):
            whose = "the tools" if owner == TOOLS else f"turn {owner}"
            raise BadRow("uncertain mask", f"the template marks text of {whose} as generated")


def _spans(turn: Turn, marked: list[Span] | None) -> tuple[list[Span], list[str]]:
    """The spans of a turn that are trained, and what has to be said of them."""
    notes = [] if turn.closed else [NO_END]
    if marked is None:
        return [turn.span], notes
    own = [(start, stop) for start, stop in marked if start < turn.last and stop > turn.first]
    if not own:
        return [], [UNMARKED]
    start, stop = own[0][0], own[-1][1]
    if start > turn.first or stop < turn.last:  # the template leaves part of the turn out on purpose
        return own, [UNMARKED]
    if turn.closed:
        return [turn.span], []
    return [(turn.start, max(stop, turn.stop))], notes if stop <= turn.stop else []


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


def _without_spaces(text: str) -> str:
    return "".join(text.split())
