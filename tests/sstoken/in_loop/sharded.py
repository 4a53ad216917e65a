"""Under FSDP2 on two processes (torchrun): losses, attention and gradients are those of the model in one piece."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from sstoken import AttentionCapture, self_modulated_loss
from sstoken.in_loop.forward import token_losses_of
from sstoken.in_loop.layout import layout_of_batch
from tests.sstoken.in_loop.small import collate, make_examples, make_model


def step(model, batch, history):
    layout = layout_of_batch(batch)
    capture = AttentionCapture(model)
    capture.expect(layout.response_mask, layout.segments)
    _, losses = token_losses_of(model, batch, layout)
    attention = capture.take()
    loss, keep = self_modulated_loss(
        layout.scatter(losses), history, attention, layout.response_mask, rho=0.4, segments=layout.segments
    )
    loss.backward()
    return losses.detach(), attention, keep


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
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
