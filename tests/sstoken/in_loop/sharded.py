"""Under FSDP2 on two processes (torchrun): losses, attention and gradients are those of the model in one piece."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from sstoken import AttentionCapture
from sstoken.in_loop.forward import Decision, SelectingModel
from sstoken.in_loop.head import HeadSignals
from sstoken.in_loop.response_tokens import find_response_tokens
from sstoken.in_loop.rule import Rule
from sstoken.methods import get_method
from tests.sstoken.in_loop.small import collate, make_examples, make_model
from tests.support import end_process


class Keeper:
    """Selects as the trainer does, and remembers what it saw."""

    signals = ("loss",)
    reference = None

    def __init__(self, tokens, capture, history):
        self.tokens, self.capture, self.history = tokens, capture, history
        method = get_method("sstoken")
        self.rule = Rule(method, method.read_params({"rho": 0.4}), "sample")
        self.num_kept = self.rule.num_kept(tokens)

    def prepare(self, model, inputs):
        self.capture.expect(self.tokens.response_mask, self.tokens.segments)

    def select(self, signals):
        attention = self.tokens.gather(self.capture.take())
        history = self.tokens.gather(self.history)
        known = {"current.loss": signals["loss"], "history.loss": history, "current.attention": attention}
        keep = self.rule.decide(known, self.tokens).keep
        self.seen = signals["loss"], attention, keep
        return Decision(keep, None, self.num_kept)


def step(model, batch, history):
    tokens = find_response_tokens(batch)
    keeper = Keeper(tokens, AttentionCapture(model), history)
    selecting = SelectingModel(model, HeadSignals(model), tokens, keeper)
    loss = selecting(**batch, num_items_in_batch=keeper.num_kept).loss
    loss.backward()
    return *keeper.seen, loss.detach()


def main():
    dist.init_process_group("gloo")
    examples = make_examples(4)
    batch, history = collate(examples), torch.zeros(4, max(len(e["input_ids"]) for e in examples))
    for row, example in enumerate(examples):
        values = torch.tensor(example["history_loss"]).nan_to_num()
        history[row, : values.numel()] = values
    whole, model = make_model(), make_model()
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for ours, expected in zip(step(model, batch, history), step(whole, batch, history), strict=True):
        torch.testing.assert_close(ours, expected)
    for (name, p), q in zip(model.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(p.grad.full_tensor(), q.grad, msg=name)
    print("equal", flush=True)


if __name__ == "__main__":
    main()
    end_process()
