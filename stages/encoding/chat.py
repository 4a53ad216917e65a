"""Encode a conversation as token ids and a response mask.

The chat template renders the conversation to text once, the tokenizer encodes the text once with character offsets,
and the tokens of the assistant's spans form the response mask. Every text of the conversation must appear in the
rendering: if the template drops one, the row is bad, unless the user allows it.
"""

import re
from bisect import bisect_left
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any

from sstoken.errors import SstokenError, first_line
from sstoken.stages import checkpoints
from sstoken.stages.encoding.messages import UNCERTAIN, BadRow, Conversation, TrainedTurns
from sstoken.stages.encoding.rendering import Rendered, Renderer, SpecialTokens
from sstoken.stages.encoding.templates import PLAIN_CHAT_TEMPLATE, Span, any_of
from sstoken.stages.token_text import byte_of_character

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_MAX_LENGTH = 4096
_SANE_MAX_LENGTH = 1_000_000
_FEWEST_WORDS = 4
"""An opening with fewer words names roles and says nothing."""
SPECIAL_KEPT = "examples with special tokens in their text"
BLANKS_CHANGED = "examples whose blanks the tokenizer changes"
PROMPT_CHANGED = "examples whose prompt has text that the tokenizer has no tokens for"
NORMALIZED = "examples whose text the tokenizer's normalizer changes"


@dataclass(frozen=True)
class EncoderOptions:
    """How conversations become tokens."""

    max_length: int | None = None
    """In tokens; None: the tokenizer's own limit, or 4096 if it has no real one."""
    chat_template: str | None = None
    """Jinja text that replaces the tokenizer's own."""
    turns: TrainedTurns = "all"
    """Which assistant turns are responses; `each` is rendered as inference would see it."""
    allow_lost: tuple[str, ...] = ()
    """Kinds of text that the template may drop."""
    keep_special_tokens: bool = False
    """Accept rows whose text contains special tokens."""


@dataclass(frozen=True)
class Encoded:
    """One example. It ends with its last response token, and is empty if truncation left no response token."""

    input_ids: list[int]
    response_mask: list[bool]
    """As long as `input_ids`: True for the assistant's tokens, including end-of-turn tokens."""
    truncated: bool
    """Truncation to the maximum length cut off response tokens."""
    turn: int | None = None
    """The message it trains on, counted from 1, where each turn is an example; None: all of them."""
    notes: tuple[str, ...] = ()
    """What to count and report about this example."""
    proof: str = field(default="", compare=False)
    """What shows where the responses are; see `Rendered`."""


class ChatEncoder:
    """Encodes conversations with one tokenizer and one chat template.

    Args:
        tokenizer: a fast tokenizer.
        options: how to encode.
        stop_tokens: tokens that stop generation, besides EOS.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        options: EncoderOptions = EncoderOptions(),
        stop_tokens: Collection[str] = (),
    ) -> None:
        self.tokenizer = tokenizer
        self._options = options
        declared = int(min(tokenizer.model_max_length, _SANE_MAX_LENGTH))
        default = declared if declared < _SANE_MAX_LENGTH else DEFAULT_MAX_LENGTH
        self.max_length = options.max_length or default
        special_tokens = SpecialTokens(
            tokenizer.special_tokens_map,
            control_tokens(tokenizer),
            self._added | set(tokenizer.all_special_tokens),
            frozenset({str(tokenizer.eos_token), *stop_tokens}),
        )
        self.renderer = Renderer(self.template, special_tokens, options.turns, options.allow_lost)

    def template(self, tools: list[dict[str, Any]] | None = None) -> str:
        """Return the Jinja text in use; a tokenizer may have a separate one for conversations with tools."""
        if self._options.chat_template is not None:
            return self._options.chat_template
        if self.tokenizer.chat_template is None:
            return ("{{- bos_token -}}" if self._adds_bos else "") + PLAIN_CHAT_TEMPLATE
        try:
            return str(self.tokenizer.get_chat_template(None, tools))
        except ValueError as error:  # several templates, none of them the default
            raise SstokenError(
                f"chat template: {str(error).splitlines()[0]}; name one with --chat-template"
            ) from error

    def encode(self, conversation: Conversation) -> list[Encoded]:
        """Encode a conversation as one example, or as one per turn.

        Token 0 is never a response token, since nothing predicts it. Text after the last response token is
        dropped. An example longer than `max_length` keeps its start.

        Raises:
            BadRow: the template refuses the conversation or drops text of it, its text contains special
                tokens, or the response spans are not certain.
        """
        notes = self._special_tokens_in(conversation)
        rendered = self.renderer.examples(conversation)
        return [self._tokenize(each, turn, notes) for turn, each in rendered]

    def added_text(self, conversation: Conversation) -> str:
        """Return what the template opens a conversation with; "" if that is only special tokens and a role's name."""
        opening = self.renderer.opening(conversation)
        words = re.sub(any_of(self._added), " ", opening) if self._added else opening
        return opening if len(re.findall(r"[^\W\d_]{2,}", words)) >= _FEWEST_WORDS else ""

    @property
    def template_origin(self) -> str:
        """Where the chat template comes from: `given`, the `tokenizer`, or `plain` if the tokenizer has none."""
        if self._options.chat_template is not None:
            return "given"
        return "plain" if self.tokenizer.chat_template is None else "tokenizer"

    def _coded(self, text: str) -> Any:
        """Tokenize a text, with offsets in characters; refuse one on which the tokenizer fails."""
        try:
            return self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # Rust's; no `Exception`
                raise
            raise BadRow("tokenizer fails", first_line(error)) from None

    def _tokenize(self, rendered: Rendered, turn: int | None, notes: tuple[str, ...]) -> Encoded:
        coded = self._coded(rendered.text)
        ids = coded["input_ids"]
        runs = _token_runs(rendered.text, rendered.spans, coded["offset_mapping"])
        changed = self._check_tokens(ids, runs, rendered)
        mask = [False] * len(ids)
        for first, last in runs:
            mask[first:last] = [True] * (last - first)
        if mask:
            mask[0] = False
        end = _length_to_last(mask)
        kept = _length_to_last(mask[: self.max_length])
        notes = (*notes, *rendered.notes, *changed)
        return Encoded(list(ids[:kept]), mask[:kept], end > self.max_length, turn, notes, rendered.proof)

    def _check_tokens(self, ids: list[int], runs: list[Span], rendered: Rendered) -> tuple[str, ...]:
        """Return notes on how the tokenizer changes text; refuse responses that spell another text than their own."""
        expected = [rendered.text[start:stop] for start, stop in rendered.spans]
        try:
            whole = self._change([ids], [rendered.text])
        except BadRow:
            whole = PROMPT_CHANGED
        changes = self._change([ids[first:last] for first, last in runs], expected), whole
        return tuple(dict.fromkeys(filter(None, changes)))

    def _change(self, runs: list[list[int]], expected: list[str]) -> str:
        """Return a note on how the tokens' text differs from the expected one, "" if it does not.

        Raises:
            BadRow: they differ in more than blanks and what the tokenizer's normalizer does.
        """
        tokens = self._byte_level
        if tokens is not None:
            spelled_bytes = (b"".join([tokens[i] for i in run]).strip() for run in runs)
            if all(run == text.encode().strip() for run, text in zip(spelled_bytes, expected, strict=True)):
                return ""
        decode = self.tokenizer.backend_tokenizer.decode
        spelled = self._unspaced("".join(decode(run, skip_special_tokens=False) for run in runs))
        text = self._unspaced("".join(expected))
        if spelled == text:
            return ""
        spelled, text = "".join(spelled.split()), "".join(text.split())
        if spelled == text:
            return BLANKS_CHANGED
        normalizer = self.tokenizer.backend_tokenizer.normalizer
        if normalizer is not None and normalizer.normalize_str(spelled) == normalizer.normalize_str(text):
            return NORMALIZED
        raise BadRow(
            "changed by the tokenizer",
            f"the response tokens spell {spelled[:40]!r}, the text is {text[:40]!r}",
        )

    def _unspaced(self, text: str) -> str:
        """Strip blanks at both ends and around special tokens, which some tokenizers swallow."""
        return (self._around_specials.sub(r"\1", text) if self._around_specials else text).strip()

    @cached_property
    def _around_specials(self) -> re.Pattern[str] | None:
        return re.compile(rf"\s*({self._specials.pattern})\s*") if self._specials else None

    @cached_property
    def _byte_level(self) -> list[bytes] | None:
        """The bytes of each token; None if the tokenizer is not byte-level. Decoding is several times slower."""
        if type(self.tokenizer.backend_tokenizer.decoder).__name__ != "ByteLevel":
            return None
        byte_of = byte_of_character()
        added = {i: str(token) for i, token in self.tokenizer.added_tokens_decoder.items()}
        return [
            added[i].encode() if i in added else bytes(byte_of.get(c, 0) for c in str(token))
            for i, token in enumerate(self.tokenizer.convert_ids_to_tokens(range(len(self.tokenizer))))
        ]

    def _special_tokens_in(self, conversation: Conversation) -> tuple[str, ...]:
        if self._specials is None:
            return ()
        turns = ((f"turn {number} holds", turn) for number, turn in enumerate(conversation.messages, 1))
        for where, value in (*turns, ("the tools hold", conversation.tools)):
            match = next(filter(None, map(self._specials.search, _texts(value))), None)
            if match and self._options.keep_special_tokens:
                return (SPECIAL_KEPT,)
            if match:
                raise BadRow(
                    "special token in the text",
                    f"{where} {match[0]!r}; remove it, or take it with --keep-special-tokens",
                )
        return ()

    @cached_property
    def _specials(self) -> re.Pattern[str] | None:
        tokens = {token for token in control_tokens(self.tokenizer) if len(token) > 2}
        return re.compile(any_of(tokens)) if tokens else None

    @cached_property
    def _added(self) -> frozenset[str]:
        return frozenset(map(str, self.tokenizer.added_tokens_decoder.values()))

    @cached_property
    def _adds_bos(self) -> bool:
        ids = self.tokenizer("a", verbose=False)["input_ids"]
        return self.tokenizer.bos_token_id is not None and ids[:1] == [self.tokenizer.bos_token_id]


def _texts(value: Any) -> Iterator[str]:
    """Yield the keys and strings of a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from map(str, value)
        yield from chain.from_iterable(map(_texts, value.values()))
    elif isinstance(value, list | tuple):
        yield from chain.from_iterable(map(_texts, value))


def control_tokens(tokenizer: "PreTrainedTokenizerBase") -> frozenset[str]:
    """Return a tokenizer's special tokens. Tokens that were merely added count as text."""
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return frozenset(added | set(tokenizer.all_special_tokens))


def _token_runs(text: str, spans: list[Span], offsets: list[Span]) -> list[Span]:
    """Return the tokens within each span, as first and one past the last. Spans and offsets are sorted.

    A token that crosses a border belongs to the side on which it has more than whitespace.
    """
    runs = []
    for start, stop in spans:
        first, last = bisect_left(offsets, (start,)), bisect_left(offsets, (stop,))
        while (
            last > first
            and offsets[last - 1][1] > stop
            and not _belongs(text, offsets[last - 1], start, stop)
        ):
            last -= 1
        while first > 0 and offsets[first - 1][1] > start and _belongs(text, offsets[first - 1], start, stop):
            first -= 1
        runs.append((first, last))
    return runs


def _belongs(text: str, token: Span, start: int, stop: int) -> bool:
    """Whether a token that crosses the border of a span belongs to the span."""
    inside = text[max(token[0], start) : min(token[1], stop)].strip()
    outside = (text[token[0] : start] + text[stop : token[1]]).strip()
    if inside and outside:
        shown = text[token[0] : token[1]]
        raise BadRow(UNCERTAIN, f"the token {shown!r} holds prompt and response alike")
    return not outside


def _length_to_last(mask: list[bool]) -> int:
    """Return the number of tokens up to and including the last response token."""
    return next((i + 1 for i in range(len(mask) - 1, -1, -1) if mask[i]), 0)


def load_encoder(model: str, options: EncoderOptions, *, trust_remote_code: bool) -> ChatEncoder:
    """Load the encoder of a checkpoint: its tokenizer, and the tokens that stop its generation."""
    tokenizer = checkpoints.load_tokenizer(model, trust_remote_code=trust_remote_code)
    return ChatEncoder(tokenizer, options, checkpoints.stop_tokens(model, tokenizer))
