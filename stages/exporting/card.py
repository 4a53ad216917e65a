"""The README.md of an export."""

from typing import Any

from sstoken.stages.exporting.base import DATA, SCORES, Facts, Target


def card(
    target: Target, facts: Facts, counts: dict[str, int], settings: dict[str, Any], *, of_method: bool = False
) -> str:
    """Return the README: what the export is, how to train on it, what each file is.

    `of_method` says that the weights, if any, are the method's own.
    """
    max_length = settings["max_length"]
    matter = target.front_matter(facts)
    head = f"---\n{matter}\ntags: [token-masked, sstoken]\n---\n" if matter else ""
    notes = [
        f"{counts['examples']:,} examples, {counts['tokens']:,} tokens, {counts['kept']:,} of them trained on; the "
        f"longest has {counts['longest']:,} tokens."
    ]
    if max_length:
        notes.append(f"Cut at {max_length:,} tokens: {counts['truncated']:,} examples were longer.")
    if counts["dropped"]:
        notes.append(f"Left out {counts['dropped']:,} examples without a token to train on.")
    if counts["kept_lost"]:
        notes.append(
            f"{counts['kept_lost']:,} kept tokens are not trained: cut off, or the first of their example, which "
            "nothing predicts."
        )
    if of_method:
        notes.append(
            "Weights: the method's for each kept token, 0 for the others, even where the method's is negative."
            if facts.weights
            else "The method's weights were left out: all kept tokens are trained alike."
        )
    elif facts.weights:
        notes.append(
            "Weights: a kept token's is (score - lowest + 1e-8) / (highest - lowest + 1e-8) over the response tokens "
            "of its example; the others' is 0."
        )
    contents = [f"| `{DATA}/` | what the trainer reads |"]
    contents += [f"| `{name}` | for the commands above |" for name in target.files(facts) if "/" not in name]
    if settings["scores"]:
        contents.append(
            f"| `{SCORES}/` | for you, not for the trainer: example_id, masks, signals and score, row-aligned with "
            f"`{DATA}/` |"
        )
    text, files = "\n".join(notes), "\n".join(contents)
    return f"""{head}# Token-masked dataset for {target.name}

{text}

## Train

Run this in this folder: paths are relative to it. MODEL stands for the model to train, whose tokenizer is the one in
`tokenizer/`.

{target.usage(facts)}
## What is here

| | |
|---|---|
{files}
| `tokenizer/` | the tokenizer that made the tokens |
| `manifest.json` | settings, counts, checksums |

`sstoken-curate export MASKED --to {target.name} --out THIS-FOLDER --check` compares every token with the masked dataset
again.
"""
