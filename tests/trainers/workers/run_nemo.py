"""NeMo Automodel: its loading, collators, both packings and loss; the steps around them are ours."""

from functools import partial
from importlib.metadata import version

import torch
from nemo_automodel.components.datasets.loader import make_dataset_config, make_packing_config
from nemo_automodel.components.datasets.utils import default_collater
from nemo_automodel.components.loss.masked_ce import MaskedCrossEntropy
from recording import IGNORED, Recording, arguments, save
from transformers import AutoModelForCausalLM


def unshift(labels):
    """From what each position predicts to what each position is."""
    return torch.nn.functional.pad(labels, (1, -1), value=IGNORED)


def load(export):
    """As a recipe's `_target_`."""
    files = f"{export}/data/*.parquet"
    arguments = {"path": "parquet", "data_files": files, "split": "train"}
    return make_dataset_config("datasets.load_dataset", arguments).build()


def train(model, rows, collate, size):
    """A step for each batch."""
    recording, model = Recording(), AutoModelForCausalLM.from_pretrained(model)
    optimizer, loss_of = torch.optim.AdamW(model.parameters(), lr=1e-3), MaskedCrossEntropy()
    for start in range(0, len(rows), size):
        batch = collate([rows[i] for i in range(start, min(start + size, len(rows)))])
        recording.weights(model)
        call = {"input_ids": batch["input_ids"], "labels": unshift(batch["labels"])}
        call |= {k: batch[k] for k in ("attention_mask", "position_ids") if k in batch}
        recording.calls.append(call)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask")).logits
        labelled = int((batch["labels"] != IGNORED).sum())
        loss = loss_of(logits, batch["labels"], num_label_tokens=labelled)
        recording.losses.append(float(loss))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return recording.report()


def pack(rows, kind):
    """The examples in its packs, out of the batches that its collator makes of them."""
    packed, collate = make_packing_config(kind, {"packed_sequence_size": 128}).build(rows, split="train")
    recording = Recording()
    for pack in packed:
        batch = collate([pack])
        call = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
        labels = batch["labels"]
        if "seq_lens" in batch:
            length = int(batch["seq_lens"][batch["seq_lens"] > 0].sum())
            call["attention_mask"] = (torch.arange(labels.shape[1]) < length).long()[None]
        else:
            call["attention_mask"] = torch.tensor([pack["attention_mask"]])
        first = (call["position_ids"] == 0) | (call["attention_mask"] == 0)
        call["labels"] = unshift(labels).masked_fill(first, IGNORED)
        ends = torch.nn.functional.pad(first, (-1, 1), value=True)
        assert (labels[ends] == IGNORED).all(), "the last token of a document predicts the next document"
        recording.calls.append(call)
    return recording.report(trains=False)


if __name__ == "__main__":
    export, model, out = arguments()
    rows = load(export)
    save(
        out,
        version=version("nemo-automodel"),
        loaded=[(r["input_ids"], [IGNORED, *r["labels"][:-1]]) for r in rows],
        plain=train(model, rows, partial(default_collater), 4),
        packed=pack(rows, "thd"),
        packed_neat=pack(rows, "neat"),
    )
