"""Render conversations to text, account for every piece of them, and locate the responses."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, takewhile
from typing import Any

from sstoken.errors import SstokenError
from sstoken.stages.encoding.altering import TEMPLATE, TOOLS
from sstoken.stages.encoding.messages import LOST, UNCERTAIN, BadRow, Conversation, Message, TrainedTurns
from sstoken.stages.encoding.pieces import Piece, details, pieces
from sstoken.stages.encoding.scaffolds import Scaffolds
from sstoken.stages.encoding.spans import SpecialTokens, Turn, TurnFinder
from sstoken.stages.encoding.templates import ChatTemplate, Span, read_template, training_variant
from sstoken.stages.encoding.tracing import SPLIT, Trace, missing, shown

NO_END = "responses that no token ends; add {{ eos_token }} after assistant contents in the chat template"
UNMARKED = "assistant turns that the chat template does not mark as generated"
MARKERS = "markers"
"""The template marks responses with {% generation %}."""
SUBSTITUTION = "substitution"
"""A second rendering, with the conversation's letters replaced."""
PATTERN = "pattern"
"""The rendering is like an earlier one, whose responses were found by substitution."""
PREFIX = "prefix"
"""Substitution, after the prompt that inference would see."""
_NAMED = 5
"""The most lost pieces that an error lists."""
TOOLS_IN_SYSTEM = (
    "examples with tool definitions as JSON in the system prompt: the chat template has no place for them"
)
SPEAKERS_LOST = "examples whose speakers have names, which the chat template leaves out"
DETAILS_LOST = "examples whose tool definitions lose details, such as defaults, to the chat template"
OUT_OF_ORDER = (
    "examples with tool results in another order than their calls, whose ids the chat template leaves out"
)
TRIMMED = "examples whose texts lose blanks at their ends to the chat template"
FOLLOWING = "examples without the messages after the last answer that is trained on"
EARLIER_REASONING = "examples whose earlier turns are shown without their reasoning, as at inference"


@dataclass(frozen=True)
class Rendered:
    """A conversation as text."""

    text: str
    spans: list[Span]
    """Start and stop (exclusive) of each response in characters; sorted."""
    notes: tuple[str, ...] = ()
    proof: str = ""
    """What shows where the responses are: one of `MARKERS`, `PATTERN`, `SUBSTITUTION`, `PREFIX`."""


class Renderer:
    """Renders conversations with the templates of one tokenizer.

    Args:
        template: returns the Jinja text for a conversation with these tools.
        special_tokens: the tokenizer's.
        turns, allow_lost: see `EncoderOptions`.
        suggest: name remedies in errors, each tried on the conversation.
    """

    def __init__(
        self,
        template: Callable[[list[dict[str, Any]] | None], str],
        special_tokens: SpecialTokens,
        turns: TrainedTurns = "all",
        allow_lost: Collection[str] = (),
        *,
        suggest: bool = True,
    ) -> None:
        self._template = template
        self._special_tokens = special_tokens
        self._turns = turns
        self._allow_lost = frozenset(allow_lost)
        self._suggest = suggest
        self._finders: dict[str, tuple[TurnFinder, Scaffolds]] = {}
        self._ways_out: dict[tuple[str, frozenset[str]], str] = {}

    def examples(self, conversation: Conversation) -> Iterator[tuple[int | None, Rendered]]:
        """Yield the examples of a conversation, each with the message (from 1) that it trains on; None: all.

        Raises:
            BadRow: the template refuses the conversation or drops text of it, or the response spans are not
                certain.
        """
        wanted = _trained(conversation)
        # Text after the last response is not trained on, and templates print the last turn in full.
        until = replace(conversation, messages=conversation.messages[: wanted[-1] + 1])
        turns: dict[TrainedTurns, Sequence[int | None]] = {"all": [None], "last": wanted[-1:], "each": wanted}
        for index in turns[self._turns]:
            rendered = self.render(until) if index is None else self._render_turn(until, index)
            if len(until.messages) < len(conversation.messages) and index in (None, wanted[-1]):
                rendered = replace(rendered, notes=(*rendered.notes, FOLLOWING))
            yield None if index is None else index + 1, rendered

    def render(self, conversation: Conversation) -> Rendered:
        """Render the complete conversation and locate its responses; raises as `examples`."""
        finder, scaffolds = self._finder(conversation)
        template = finder.template
        if template.marks_responses:
            text, marked = template.render_marked(conversation)
        else:
            text, marked = template.render(conversation), None
        wanted = _trained(conversation)
        notes = _notes_of(conversation, template, text)
        turns = scaffolds.recognise(text, conversation)
        proof = SUBSTITUTION if turns is None else PATTERN
        if turns is None:
            found = finder.trace(conversation, text)
            lost = self._check_lost(missing(found, conversation, template.protected), conversation)
            notes += [f"examples whose {kind} the chat template leaves out" for kind in lost]
            answers = [i for i, m in enumerate(conversation.messages) if m["role"] == "assistant"]
            try:
                turns = [finder.turn(found, conversation, i) for i in (wanted if lost else answers)]
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
                own, remarks = _spans(turn, marked)
                spans += own
                notes += remarks
        if not spans:
            raise BadRow(UNCERTAIN, "the template marks no text of this conversation as generated")
        return Rendered(text, spans, tuple(notes), proof if marked is None else MARKERS)

    def opening(self, conversation: Conversation) -> str:
        """Return what the template prints before the conversation's first text, such as a system prompt of its own."""
        found = self._finder(conversation)[0].trace(conversation)
        return found.text[: found.after(0)]

    def _render_turn(self, conversation: Conversation, index: int) -> Rendered:
        """Render one turn after the prompt that the model sees before it at inference."""
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
        turn = finder.turn(found, until, index)
        head = prompt.text[: prompt.before(len(prompt.text))]
        text = head + found.text[found.before(turn.first) : turn.stop]
        notes = _notes_of(until, finder.template, text)
        notes += [f"examples whose {kind} the chat template leaves out" for kind in kinds]
        notes += [EARLIER_REASONING] if earlier else []
        marked = finder.template.render_marked(until)[1] if finder.template.marks_responses else None
        spans, remarks = _spans(turn, marked)
        if not spans:
            raise BadRow(UNCERTAIN, f"the template does not mark turn {index + 1} as generated")
        moved = len(head) - found.before(turn.first)
        return Rendered(
            text,
            [(start + moved, stop + moved) for start, stop in spans],
            (*notes, *remarks),
            PREFIX if marked is None else MARKERS,
        )

    def _check_lost(self, lost: Sequence[Piece], conversation: Conversation) -> list[str]:
        """Return the kinds of lost text; refuse kinds that are not allowed, and a turn of which nothing is left."""
        if not lost:
            return []
        kinds = sorted({piece.kind for piece in lost})
        if refused := [piece for piece in lost if piece.kind not in self._allow_lost]:
            places = dict.fromkeys(piece.place for piece in refused)
            way_out = self._way_out(conversation, frozenset(piece.kind for piece in refused))
            raise BadRow(LOST, f"{', '.join(islice(places, _NAMED))}; {way_out}")
        for index in _trained(conversation):
            own = {p.text for p in pieces(conversation) if p.owner == index + 1}
            if own <= {p.text for p in lost if p.owner == index + 1}:
                raise BadRow(LOST, f"all of turn {index + 1}: its response would be a bare end token")
        return kinds

    def _way_out(self, conversation: Conversation, kinds: frozenset[str] = frozenset()) -> str:
        """Suggest what to do about lost or split text; each suggestion is tried on this conversation.

        The result is cached by kind of loss, so later rows get the same suggestion.
        """
        if not self._suggest:
            return ""
        source = self._template(conversation.tools)
        key = (source, kinds)
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
        self._ways_out[key] = f"take {', or '.join(ways or ['a --chat-template that prints all of it'])}"
        return self._ways_out[key]

    def _takes(
        self,
        conversation: Conversation,
        source: str,
        turns: TrainedTurns,
        allow_lost: frozenset[str] = frozenset(),
    ) -> bool:
        other = Renderer(
            lambda tools: source, self._special_tokens, turns, self._allow_lost | allow_lost, suggest=False
        )
        try:
            return all(rendered.spans for _, rendered in other.examples(conversation))
        except SstokenError:
            return False

    def _finder(self, conversation: Conversation) -> tuple[TurnFinder, Scaffolds]:
        source = self._template(conversation.tools)
        if source not in self._finders:
            template = ChatTemplate(source, self._special_tokens.named)
            self._finders[source] = TurnFinder(template, self._special_tokens), Scaffolds()
        return self._finders[source]


def _notes_of(conversation: Conversation, template: ChatTemplate, text: str) -> list[str]:
    notes = [TOOLS_IN_SYSTEM] if conversation.tools and template.tools_in_system else []
    detailed = all(shown(each, text) for each in details(conversation.tools or []))
    notes += [] if detailed else [DETAILS_LOST]
    named = any(m.get("name") and m["role"] in ("user", "assistant") for m in conversation.messages)
    notes += [SPEAKERS_LOST] if named and not template.prints_speakers else []
    said = (m.get(key) or "" for m in conversation.messages for key in ("content", "reasoning_content"))
    trimmed = any(each != (bare := each.strip()) and bare in text and not shown(each, text) for each in said)
    notes += [TRIMMED] if trimmed else []
    return [*notes, OUT_OF_ORDER] if _out_of_order(conversation.messages, text) else notes


def _out_of_order(messages: Sequence[Message], text: str) -> bool:
    """Whether only ids that the text does not contain tell which result belongs to which call."""
    for index, message in enumerate(messages):
        calls = [call.get("id") for call in message.get("tool_calls") or ()]
        if not calls:
            continue
        following = takewhile(lambda m: m["role"] == "tool", messages[index + 1 :])
        results = [found for found in (m.get("tool_call_id") for m in following) if found in calls]
        if results != [call for call in calls if call in results] and not all(
            str(r) in text for r in results
        ):
            return True
    return False


def _trained(conversation: Conversation) -> list[int]:
    """Return the indices of the messages to train on."""
    answers = [i for i, m in enumerate(conversation.messages) if m["role"] == "assistant"]
    trained = [i for i in answers if i not in conversation.untrained]
    if not trained:
        raise BadRow("no answer", "every assistant turn is marked as not to be trained on")
    return trained


def _check_marks(marked: list[Span], found: Trace, turns: Sequence[Turn]) -> None:
    """Refuse generation marks around text that is not the assistant's."""
    allowed = [TEMPLATE, *(turn.message + 1 for turn in turns)]
    for start, stop in marked:
        for owner in set(found.owners[start:stop].tolist()) - set(allowed):
            whose = "the tools" if owner == TOOLS else f"turn {owner}"
            raise BadRow(UNCERTAIN, f"the template marks text of {whose} as generated")


def _spans(turn: Turn, marked: list[Span] | None) -> tuple[list[Span], list[str]]:
    """Return the spans of a turn that are trained on, and notes about them."""
    notes = [] if turn.closed else [NO_END]
    if marked is None:
        return [(turn.start, turn.stop)], notes
    own = [(start, stop) for start, stop in marked if start < turn.last and stop > turn.first]
    if not own:
        return [], [UNMARKED]
    start, stop = own[0][0], own[-1][1]
    if start > turn.first or stop < turn.last:  # the template excludes part of the turn on purpose
        return own, [UNMARKED]
    if turn.closed:
        return [(turn.start, turn.stop)], []
    return [(turn.start, max(stop, turn.stop))], notes if stop <= turn.stop else []
