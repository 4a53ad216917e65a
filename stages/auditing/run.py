"""Run an audit: open the dataset, check every row, sum up."""

from collections.abc import Collection, Iterator, Mapping
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any

import numpy as np

from sstoken.errors import SstokenError, UsageError
from sstoken.stages import checkpoints, tables
from sstoken.stages.auditing import shape as shapes
from sstoken.stages.auditing.checks import labels, special_tokens
from sstoken.stages.auditing.checks.answers import Answers
from sstoken.stages.auditing.checks.lengths import Lengths, Tally
from sstoken.stages.auditing.checks.parts import Parts
from sstoken.stages.auditing.checks.rows import examples
from sstoken.stages.auditing.checks.signals import check as check_signals
from sstoken.stages.auditing.checks.template import NO_TEMPLATE, Conversations
from sstoken.stages.auditing.checks.turn_ends import TurnEnds
from sstoken.stages.auditing.data_files import Row
from sstoken.stages.auditing.examples import Cutter, Example
from sstoken.stages.auditing.findings import Audit, AuditResult
from sstoken.stages.auditing.reading import OpenedDataset, open_source
from sstoken.stages.auditing.vocabulary import Vocabulary
from sstoken.stages.encoding.chat import EncoderOptions, load_encoder
from sstoken.stages.encoding.layouts import Layout, Preference, detect_layout
from sstoken.stages.encoding.messages import TrainedTurns
from sstoken.stages.encoding.templates import ChatTemplate, read_template
from sstoken.stages.storage import expanded
from sstoken.stages.weight_files import read_json

_ANY_LENGTH = 1 << 40


def audit(
    source: Any,
    *,
    model: str | None = None,
    tokenizer: str | None = None,
    tokens: str | Path | None = None,
    split: str | None = None,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    ignore_columns: Collection[str] = (),
    preference: Preference = "stop",
    turns: TrainedTurns = "all",
    chat_template: str | None = None,
    allow_lost: Collection[str] = (),
    keep_special_tokens: bool = False,
    shifted_labels: bool = False,
    max_length: int | None = None,
    limit: int | None = None,
    trust_remote_code: bool = False,
) -> AuditResult:
    """Check what a trainer would learn from a dataset, without loading any weights.

    Args:
        source: raw conversations, a tokenised dataset or a folder that a stage wrote: a path, a pattern, a Hub id, or
            a dataset, an Arrow table or a list of rows in memory.
        model: checkpoint whose tokenizer, chat template and stop tokens to use; required for raw conversations.
        tokenizer: a tokenizer without a model, for the texts of a tokenised dataset.
        tokens: the folder of tokens that a scores folder belongs to; None: look for it beside them.
        split, format, columns, ignore_columns, preference, turns, chat_template, allow_lost, keep_special_tokens: see
            the fields of `Encode`.
        shifted_labels: whether the trainer expects labels shifted by one (NeMo, Megatron).
        max_length: length in tokens at which training will cut rows; None: for conversations, `encode`'s default.
        limit: check only this many rows, from the first.
        trust_remote_code: run code that comes with the tokenizer.

    Raises:
        UsageError: the source does not exist or is not a dataset, or raw conversations come without a model.
        SstokenError: files are damaged, the tokenizer does not load, or the columns match no layout.
    """
    template = None if chat_template is None else read_template(chat_template)
    opened = open_source(
        source, split, shifted=shifted_labels, tokens=None if tokens is None else expanded(tokens)
    )
    state = Audit()
    rows = _counted(islice(opened.rows, limit), state)
    ref = model or tokenizer
    if opened.columns is not None:
        place = ref or (str(opened.tokenizer) if opened.tokenizer else None)
        if place is not None:
            loaded = checkpoints.load_tokenizer(place, trust_remote_code=trust_remote_code)
            state.vocabulary = _vocabulary(place if ref else _made_by(opened, place), loaded)
            template = template or _own_template(loaded)
        found: Iterator[Example] = chain.from_iterable(examples(row, opened.columns, state) for row in rows)
        return _checked(opened, found, state, template, max_length or opened.max_length)
    if ref is None:
        raise UsageError(
            f"{opened.shown}: raw conversations (no input_ids); name the --model whose chat template and "
            "tokenizer are used"
        )
    options = EncoderOptions(None, template, turns, tuple(allow_lost), keep_special_tokens)
    encoder = load_encoder(ref, options, trust_remote_code=trust_remote_code)
    declared, encoder.max_length = encoder.max_length, _ANY_LENGTH
    state.vocabulary = _vocabulary(ref, encoder.tokenizer)
    named, ignored = dict(columns or {}), frozenset(ignore_columns)

    def detect(row: Any, preference: Preference) -> Layout:
        return detect_layout(row, format, named, ignored, preference)

    conversations = Conversations(encoder, detect, preference, state)
    if encoder.template_origin == "plain":
        state.report_count(NO_TEMPLATE, 1, None, f"{ref}: its tokenizer has none")
    found = conversations.examples(rows)
    result = _checked(opened, found, state, encoder.template(), max_length or declared)
    result.facts |= conversations.facts()
    return result


def _counted(rows: Iterator[Row], audit: Audit) -> Iterator[Row]:
    for row in rows:
        audit.num_rows += 1
        yield row


def _checked(
    opened: OpenedDataset,
    found: Iterator[Example],
    audit: Audit,
    template: str | None,
    max_length: int | None,
) -> AuditResult:
    """Run all checks on every example and sum up."""
    vocabulary, cut = audit.vocabulary, None
    if vocabulary is not None:
        audit.shape.closers = set(vocabulary.stops)
        if template is not None:
            special = vocabulary.tokenizer.special_tokens_map
            audit.shape = shapes.learn(ChatTemplate(template, special), vocabulary)
        cut = Cutter(vocabulary, audit.shape)
    tally, parts, answers = Tally(), Parts(), Answers()
    lengths, ends = Lengths(max_length), TurnEnds(max_length)
    for _, row in groupby(found, key=lambda example: example.row):
        documents = list(row)
        ids, trained = (np.concatenate([getattr(d, name) for d in documents]) for name in ("ids", "trained"))
        lengths.add(documents[0], trained, audit)
        answers.add_row(ids, documents[0], audit)
        labels.check_row(documents[0], trained, audit)
        for example in documents:
            if cut is not None:
                cut(example)
            tally.add(example, audit)
            labels.check(example, audit)
            ends.check(example, audit)
            special_tokens.check(example, audit)
            parts.check(example, audit)
            answers.check(example, audit)
    for check in (ends, lengths, answers):
        check.finish(audit)
    facts = {"rows": audit.num_rows, **tally.facts(), **lengths.facts(), "ends": ends.facts()}
    facts |= {"parts": parts.facts(), **answers.facts()}
    facts["tokenizer"] = None if vocabulary is None else vocabulary.tokenizer.name_or_path
    facts["turns_known"] = audit.shape.known
    if opened.scores is not None and opened.tokens is not None:
        facts["signals"] = check_signals(opened.scores, opened.tokens, audit)
    return AuditResult(opened.shown, opened.form, facts, audit.findings())


def _vocabulary(ref: str, tokenizer: Any) -> Vocabulary:
    return Vocabulary(tokenizer, checkpoints.stop_tokens(ref, tokenizer), _model_size(ref))


def _model_size(ref: str) -> int | None:
    """Return the size of a local model's embedding, which may be larger than its tokenizer; None if not known."""
    try:
        folder = checkpoints.local_folder(ref)
        config = {} if folder is None else read_json(folder / "config.json")
    except (SstokenError, OSError):
        return None
    size = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    return size if isinstance(size, int) else None


def _made_by(opened: OpenedDataset, place: str) -> str:
    """Return the model that a folder's tokenizer came from, if it still exists: it knows its stop tokens."""
    folder = Path(opened.shown)
    try:
        name = tables.read_metadata(tables.parts(folder)[0])["tokenizer"]["name"]
        return str(name) if Path(name).is_dir() else place
    except (SstokenError, IndexError, KeyError, TypeError):
        return place


def _own_template(tokenizer: Any) -> str | None:
    if tokenizer.chat_template is None:
        return None
    try:
        return str(tokenizer.get_chat_template(None, None))
    except ValueError:  # several templates without a default
        return None
