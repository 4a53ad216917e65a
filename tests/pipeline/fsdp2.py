"""Under torchrun: train for two steps with FSDP2, and save the weights in pieces as accelerate does."""

import sys

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

from sstoken.stages.processes import end_process


def main(base: str, out: str) -> None:
    dist.init_process_group("gloo")
    model = AutoModelForCausalLM.from_pretrained(base)
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(dist.get_rank())
    for _ in range(2):
        ids = torch.randint(1, 60, (2, 12))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=f"{out}/pytorch_model_fsdp_0")
    whole = {name: weight.full_tensor() for name, weight in model.state_dict().items()}
    if dist.get_rank() == 0:
        torch.save(whole, f"{out}/whole.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
    end_process(0)
