"""verl: its loading of the export's dataset class, collator and loss; the steps around them are ours."""

import ast
from importlib.metadata import version
from pathlib import Path

import torch
import verl
from omegaconf import OmegaConf
from recording import IGNORED, Recording, arguments, save
from transformers import AutoModelForCausalLM
from verl.utils.dataset.dataset_utils import DatasetPadMode, SFTTensorCollator
from verl.workers.utils.losses import sft_loss


def loading_function():
    """`create_sft_dataset` of `verl.trainer.sft_trainer`, without the engines that file imports."""
    path = Path(verl.__file__).parent / "trainer" / "sft_trainer.py"
    found = next(
        node for node in ast.parse(path.read_text()).body if getattr(node, "name", "") == "create_sft_dataset"
    )
    names = {}
    exec(compile(ast.Module([found], []), path, "exec"), names)
    return names["create_sft_dataset"]


def log_probs(model, ids):
    """As its engine gives them: position i holds that of token i + 1 of the batch laid end to end."""
    flat = []
    for row in ids.unbind():
        logits = model(row[None]).logits[0].log_softmax(-1)
        following = torch.cat([row[1:], row[:1]])
        flat.append(logits.gather(1, following[:, None])[:, 0])
    return torch.nested.as_nested_tensor(flat, layout=torch.jagged)


def train(model, rows, size):
    """A step for each batch."""
    recording, model = Recording(), AutoModelForCausalLM.from_pretrained(model)
    optimizer, collate = (
        torch.optim.AdamW(model.parameters(), lr=1e-3),
        SFTTensorCollator(DatasetPadMode.NO_PADDING),
    )
    for start in range(0, len(rows), size):
        batch = collate([rows[i] for i in range(start, min(start + size, len(rows)))])
        recording.weights(model)
        masks = batch["loss_mask"]
        for ids, mask in zip(batch["input_ids"].unbind(), masks.unbind(), strict=True):
            labels = torch.where(mask > 0, ids, IGNORED)
            recording.calls.append({"input_ids": ids[None], "labels": labels[None]})
        data = {"loss_mask": masks, "dp_size": 1, "batch_num_tokens": masks.values().sum()}
        loss, _ = sft_loss(None, {"log_probs": log_probs(model, batch["input_ids"])}, data)
        recording.losses.append(float(loss))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    report = recording.report()
    flat = [row for step in report["steps"] for row in step]
    report["steps"] = [flat[i : i + size] for i in range(0, len(flat), size)]
    return report


if __name__ == "__main__":
    export, model, out = arguments()
    config = OmegaConf.create(
        {
            "pad_mode": "no_padding",
            "custom_cls": {"path": str(export / "masked_dataset.py"), "name": "MaskedDataset"},
        }
    )
    rows = loading_function()(f"{export}/data/*.parquet", config, None, None)
    loaded = [(r["input_ids"], torch.where(r["loss_mask"] > 0, r["input_ids"], IGNORED)) for r in rows]
    save(
        out,
        version=version("verl"),
        loaded=[(ids.tolist(), labels.tolist()) for ids, labels in loaded],
        plain=train(model, rows, 4),
    )
