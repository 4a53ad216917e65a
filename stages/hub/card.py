"""The dataset card: README.md of a published masked dataset, with the front matter for the Hub's viewer."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import yaml

from sstoken.methods import METHODS
from sstoken.stages.masked_card import decisive_settings
from sstoken.stages.token_text import markdown

if TYPE_CHECKING:
    from huggingface_hub import DatasetCardData

TAGS = ("token-masked", "sstoken")
_SIZES = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B", "1B<n<10B")
COLUMNS = {
    "example_id": "name of the example in the source",
    "input_ids": "token ids, chat template applied",
    "labels": "the token's own id where it is kept, -100 elsewhere",
    "keep_mask": "true where the token is kept",
    "response_mask": "true where the token is part of an assistant's turn, and so could be kept",
    "rel": "loss under the history checkpoint minus loss under the current one, in nats",
    "attention": "attention that the token pays to the prompt, in [0, 1]",
    "score": "what the method judged the token by",
    "weight": "what the token's loss is multiplied by",
}
"""What each column holds; measured values are null outside the response."""


@dataclass(frozen=True)
class Shards:
    """The contents of the published Parquet files."""

    schema: pa.Schema
    examples: int
    tokens: int
    arrow_bytes: int
    """Estimated size of the rows in memory."""
    file_bytes: int


def card(
    repo: str,
    facts: Mapping[str, Any],
    metrics: Mapping[str, Any],
    origin: Mapping[str, Any],
    license: str | list[str] | None,
    shards: Shards,
    *,
    report: str | None = None,
) -> str:
    """Return the card's text. The same arguments give the same bytes.

    Args:
        repo: user/name.
        facts, metrics, origin: see `Provenance`; `facts` are its `masked`.
        license: one or several license names as on the Hub; None: unknown.
        shards: what is published.
        report: name of the page that shows its tokens, if it is published too.
    """
    hub, source = _data(origin).get("hub"), _source(origin)
    title = f"{hub or repo.partition('/')[2]}, token-masked"
    link = f"[{markdown(source)}](https://huggingface.co/datasets/{hub})" if hub else markdown(source)
    front = _front_matter(title, origin, license, shards)
    # str.format, not DatasetCard.from_template: values are escaped for Markdown here, and are never a template.
    return _CARD.format(
        # not to_yaml, which writes characters that turn text around as they are
        front=yaml.safe_dump(front.to_dict(), sort_keys=False, width=1000),
        title=markdown(title),
        source=f", made from {link}" if source else "",
        examples=f"{shards.examples:,}",
        tokens=f"{shards.tokens:,}",
        kept=f"{metrics['kept']:,}",
        response=f"{metrics['response_tokens']:,}",
        share=f"{metrics['kept_share']:.1%}",
        columns="\n".join(f"| `{f.name}` | {_type(f)} | {COLUMNS[f.name]} |" for f in shards.schema),
        settings="\n".join(f"| {markdown(k)} | {markdown(v)} |" for k, v in _settings(facts, origin)),
        repo=repo,
        model=next(iter(_base_models(origin)), "your/model"),
        longest=facts.get("max_length") or 4096,
        licence=_licence(license),
        report=_REPORT.format(name=report) if report else "",
    )


def _front_matter(
    title: str, origin: Mapping[str, Any], license: str | list[str] | None, shards: Shards
) -> "DatasetCardData":
    """Return what the Hub reads: licence, tags, and the shards with their columns; what is not known is left out."""
    from huggingface_hub import DatasetCardData

    source = _data(origin).get("hub")
    paths = [{"split": "train", "path": "data/part-*.parquet"}]
    return DatasetCardData(
        license=license or None,
        pretty_name=title,
        task_categories=["text-generation"],
        tags=list(TAGS),
        size_categories=[_SIZES[min(len(_SIZES) - 1, max(0, len(str(shards.examples)) - 3))]],
        source_datasets=[source] if source else None,
        base_model=_base_models(origin) or None,
        configs=[{"config_name": "default", "data_files": paths}],
        dataset_info={
            "features": [_feature(field) for field in shards.schema],
            "splits": [{"name": "train", "num_bytes": shards.arrow_bytes, "num_examples": shards.examples}],
            "download_size": shards.file_bytes,
            "dataset_size": shards.arrow_bytes,
        },
    )


def _base_models(origin: Mapping[str, Any]) -> list[str]:
    """Return the Hub models used to encode and score the dataset: the base of an adapter, not the adapter."""
    checkpoints = (origin.get("checkpoints") or {}).values()
    identities = [origin.get("tokenizer"), *((c or {}).get("base", c) for c in checkpoints)]
    named = [identity["hub"] for identity in identities if identity and isinstance(identity.get("hub"), str)]
    return list(dict.fromkeys(named))


def _settings(facts: Mapping[str, Any], origin: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """Return name and value of every setting that decided the mask."""
    method = METHODS.get(facts["method"])
    yield "method", facts["method"]
    if method is not None:
        yield "score", method.formula
    for key, value in decisive_settings(facts).items():
        yield key, str(value)
    for key in ("scope", "seed", "layer", "max_length"):
        if facts.get(key) is not None:
            yield key.replace("_", " "), str(facts[key])
    checkpoints = origin.get("checkpoints") or {}
    for role, checkpoint in sorted(facts["checkpoints"].items()):
        commit = (checkpoints.get(role) or {}).get("commit")
        known = f" at {commit}" if commit else ""
        yield role, f"{checkpoint['checkpoint']}{known} ({checkpoint['dtype']})"
    yield "tokenizer", f"{facts['tokenizer']['name']} (vocabulary {facts['tokenizer']['fingerprint']})"
    if commit := _data(origin).get("commit"):
        yield "source", f"{_source(origin)} at {commit}"
    yield "sstoken", facts["version"]
    yield "run fingerprint", facts["fingerprint"]


def _data(origin: Mapping[str, Any]) -> Mapping[str, Any]:
    return origin.get("data") or {}


def _source(origin: Mapping[str, Any]) -> str:
    return _data(origin).get("hub") or origin.get("name") or ""


def _licence(license: str | list[str] | None) -> str:
    if license:
        names = license if isinstance(license, str) else ", ".join(license)
        return f"Published under {markdown(names)}; the terms of what it was made from apply."
    return "No licence was recorded: the terms of what it was made from apply."


def _feature(field: pa.Field) -> dict[str, Any]:
    # every version of `datasets` reads `sequence`, but only 4.0 and later read `list`
    if pa.types.is_list(field.type):
        return {"name": field.name, "sequence": _dtype(field.type.value_type)}
    return {"name": field.name, "dtype": _dtype(field.type)}


def _dtype(kind: pa.DataType) -> str:
    return {"float": "float32"}.get(str(kind), str(kind))


def _type(field: pa.Field) -> str:
    listed = pa.types.is_list(field.type)
    return f"list of {_dtype(field.type.value_type)}" if listed else _dtype(field.type)


_REPORT = """\
[{name}](resolve/main/{name}?download=true) shows many examples with every signal that was recorded: a page that holds
all it shows and loads nothing. Download it and open it.

"""
_CARD = """\
---
{front}---
# {title}

A token-masked dataset for supervised fine-tuning{source}: {examples} examples of {tokens} tokens in all, where
{kept} of {response} response tokens ({share}) are marked as worth learning from. The others have label -100, so
any trainer that takes `input_ids` and `labels` leaves them out. It was made by [sstoken](https://arxiv.org/abs/2510.18250).

![How the scores of kept and dropped tokens are distributed](scores.svg)

One example: kept tokens on a colour by score, dropped ones struck out, the prompt dim.

![The tokens of one example](example.svg)

{report}## Columns

| column | type | content |
|---|---|---|
{columns}

## How it was made

| setting | value |
|---|---|
{settings}

`provenance.json` holds the same with the checksum of every file; `sstoken-curate pull` checks them.

## Load it

```python
from datasets import load_dataset

dataset = load_dataset("{repo}", split="train")
```

## Train on it

```python
from datasets import load_dataset
from huggingface_hub import snapshot_download
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

files = snapshot_download("{repo}", repo_type="dataset", allow_patterns="tokenizer/*")
trainer = SFTTrainer(
    model="{model}",
    args=SFTConfig("trained", packing=True, max_length={longest}),
    train_dataset=load_dataset("{repo}", split="train").select_columns(["input_ids", "labels"]),
    processing_class=AutoTokenizer.from_pretrained(files + "/tokenizer"),
)
trainer.train()
```

This needs TRL 1.7 or later: older ones drop the labels when packing. With transformers' own `Trainer`, use
`DataCollatorForSeq2Seq`; `DataCollatorForLanguageModeling` overwrites the labels. For other trainers, fetch it with
`sstoken-curate pull {repo} --out masked`, then `sstoken-curate export masked --to TRAINER --out DIR`.

## Limits

- The ids belong to the tokenizer in `tokenizer/`: train a model with that vocabulary.
- The mask says what was worth learning for the checkpoints above. How far it helps another model or another task
  must be measured: compare with a random choice of as many tokens.
- Response tokens that open an answer have only the prompt to attend to, so a score that counts attention ranks
  them high.
- {licence}
"""
