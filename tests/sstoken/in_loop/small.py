"""What in-loop tests share: a tiny model, examples with history losses, and a slow, obvious recomputation."""

import copy

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast, TrainingArguments

from sstoken.methods import decide
from tests import factories
from tests.factories import VOCABULARY, tiny_llama

SETTINGS = {
    "max_steps": 3,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 1,
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "seed": 3,
}


def arguments(folder, **changes):
    return TrainingArguments(str(folder), **SETTINGS | changes)


def make_model(implementation="sdpa", layers=2):
    """Far from uniform attention and loss, so that errors show."""
    return tiny_llama(
        num_hidden_layers=layers,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        pad_token_id=0,
        initializer_range=0.2,
        attn_implementation=implementation,
    )


def make_examples(number=24, longest=24, seed=0):
    """Random tokens with one or two answers, and history losses as of some other model."""
    random = np.random.default_rng(seed)
    rows = []
    for i in range(number):
        length = int(random.integers(6, longest + 1))
        ids = random.integers(1, VOCABULARY, length)
        response = np.arange(length) >= length // 3
        if i % 3 == 0:
            response[length // 2] = False
        history = np.where(response, random.gamma(4.0, 1.5, length), np.nan).astype(np.float32)
        labels = np.where(response, ids, -100)
        rows.append({"input_ids": ids.tolist(), "labels": labels.tolist(), "history_loss": history.tolist()})
    return rows


def make_scored_examples(number=24, longest=24, seed=0, first=None):
    """The same with the losses of a relative of `make_model()`: an earlier or later checkpoint.

    `first`: from the ids to the position where the response begins; None: as in `make_examples`.
    """
    relative = make_model()
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in relative.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    examples = make_examples(number, longest, seed)
    for example in examples:
        if first is not None:
            start = first(example["input_ids"])
            example["labels"] = [-100] * start + example["input_ids"][start:]
        response = np.array(example["labels"]) != -100
        example["history_loss"] = np.where(
            response, losses_of(relative, example["input_ids"]), np.nan
        ).tolist()
    return examples


@torch.no_grad()
def losses_of(model, ids):
    """Return each token's loss, from all logits in float32; 0 for the first, which nothing predicts."""
    log_probs = model(torch.tensor([list(ids)])).logits[0].float().log_softmax(-1)
    return np.array([0.0] + [-float(log_probs[i - 1, t]) for i, t in enumerate(ids) if i], dtype=np.float32)


def collate(features, side="right"):
    """A padding data collator of few words."""
    length = max(len(f["input_ids"]) for f in features)

    def padded(name, value):
        rows = []
        for feature in features:
            row = list(feature[name]) if name in feature else [1] * len(feature["input_ids"])
            fill = [value] * (length - len(row))
            rows.append(row + fill if side == "right" else fill + row)
        return torch.tensor(rows)

    return {
        "input_ids": padded("input_ids", 0),
        "labels": padded("labels", -100),
        "attention_mask": padded("attention_mask", 0),
    }


def collate_left(features):
    return collate(features, side="left")


def flatten(features):
    """A padding-free data collator: one row, positions that start again."""
    return {
        "input_ids": torch.tensor([[i for f in features for i in f["input_ids"]]]),
        "labels": torch.tensor([[i for f in features for i in f["labels"]]]),
        "position_ids": torch.tensor([[i for f in features for i in range(len(f["input_ids"]))]]),
    }


def save_tokenizer(folder):
    factories.save_tokenizer(folder, pad=True)
    return PreTrainedTokenizerFast.from_pretrained(folder)


class Watcher:
    """Keeps what observers see, and the weights at the start of each step."""

    def __init__(self):
        self.seen = []
        self.weights = {}

    def __call__(self, observation):
        self.seen.append(observation)

    def masks(self):
        """Keep masks by step and tokens."""
        return {(o.step, o.input_ids.tobytes()): o.keep_mask.tolist() for o in self.seen}


def dumping(watcher, trainer_class):
    """The trainer, that also dumps its weights at the start of each optimisation step."""

    class Dumping(trainer_class):
        def get_batch_samples(self, *args, **kwargs):
            state = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
            watcher.weights[self.state.global_step] = state
            return super().get_batch_samples(*args, **kwargs)

    return Dumping


def recompute(model, weights, example, rho, gamma, layer=-1):
    """One example's keep mask, offline, the slow way: eager attention, all logits, numpy."""
    model = copy.deepcopy(model)
    model.load_state_dict(weights)
    model.set_attn_implementation("eager")
    model.eval()
    ids = torch.tensor([example["input_ids"]])
    with torch.no_grad():
        output = model(ids, output_attentions=True)
    response = np.array(example["labels"]) != -100
    response[0] = False
    log_probs = output.logits[0].log_softmax(-1)
    loss = np.array([0.0] + [-float(log_probs[i - 1, t]) for i, t in enumerate(ids[0].tolist()) if i])
    weights_TT = output.attentions[layer][0].mean(0).numpy()
    attention = (weights_TT * ~response).sum(1)
    signals = {
        "history.loss": np.array(example["history_loss"], dtype=np.float64)[response],
        "current.loss": loss[response],
        "current.attention": attention[response].astype(np.float64),
    }
    keep = np.zeros(response.size, dtype=bool)
    keep[response] = decide("sstoken", np.array([0, response.sum()]), signals, rho=rho, gamma=gamma).keep
    return keep.tolist()
