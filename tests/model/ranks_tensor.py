"""What each rank of test_tensor_parallel.py runs: the logits, gradients and steps of a divided model.
Usage: ranks_tensor.py CONFIGS FOLDER."""

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh

from components.model.gpt import GPT, GPTConfig
from components.model.tensor_parallel import divide, gathered


def drawn(config: GPTConfig) -> GPT:
    """A model whose every part matters: no weight or bias is near 0 or 1."""
    torch.manual_seed(0)
    model = GPT(config)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model


def train(model: GPT) -> tuple[torch.Tensor, list[float]]:
    """The logits before, and the losses of four steps, each on two micro-batches whose gradients add up."""
    ids = torch.randint(0, 40, (4, 17), generator=torch.Generator().manual_seed(1))
    logits = model(ids[:, :-1]).detach()
    sgd = torch.optim.SGD(model.parameters(), lr=0.2)  # unlike Adam's, its step shows how large a gradient is
    losses = []
    for _ in range(4):
        total = 0.0
        for rows in ids.split(2):
            loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten()) / 2
            loss.backward()
            total += float(loss.detach())
        losses.append(total)
        sgd.step()
        sgd.zero_grad()
    return logits, losses


def main(configs: dict, out: Path) -> None:
    torch.distributed.init_process_group("gloo")
    for name, config in configs.items():
        model = divide(drawn(GPTConfig.model_validate(config)), init_device_mesh("cpu", (2,)))
        held = sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in model.parameters())
        logits, losses = train(model)
        found = {k: v.contiguous() for k, v in gathered(model).items()} | {"logits": logits}
        rank = torch.distributed.get_rank()
        save_file(found | {"losses": torch.tensor([*losses, held])}, out / f"{name}-{rank}.safetensors")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))
