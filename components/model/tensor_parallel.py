"""A model cut by width: each rank holds some heads and some of the MLP's units of every block (Shoeybi et al. 2019).

The first matrix of attention and of the MLP is cut by rows, the second by columns, so that a block adds up over the
ranks twice. Norms, embedding and head are whole on every rank. `torch.distributed.tensor` moves activations and
gradients. Every rank is given the same tokens.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from components.artifact import ForjaError
from components.model.gpt import GPT, GPTConfig


@torch.no_grad()
def divide(model: GPT, mesh: DeviceMesh) -> GPT:
    """Keep this rank's part of `model`, which is changed in place. It has no key-value cache then.

    Raises ForjaError where the heads or the MLP's units are not a multiple of the ranks.
    """
    n, config = mesh.size(), model.config
    for what in ("heads", "kv_heads", "mlp_width"):
        if getattr(config, what) % n:
            raise ForjaError(f"{what}: {getattr(config, what)} cannot be cut for {n} ranks; take a divisor of it")
    plan: dict[str, Any] = {"attention.qkv": ColwiseParallel(), "attention.out": RowwiseParallel()}
    plan |= {"mlp.up": ColwiseParallel(), "mlp.down": RowwiseParallel()}
    for block in model.blocks:
        for linear, rows in _cut(block, config, n):
            for p in linear.parameters():
                p.copy_(p[rows])
        attention: Any = block.attention
        attention.heads, attention.kv_heads = config.heads // n, config.kv_heads // n
        parallelize_module(block, mesh, plan)
        for norm in (attention.q_norm, attention.k_norm):  # whole, but only this rank's heads use them here
            for p in norm.parameters():
                p.register_hook(lambda gradient: _summed(gradient, mesh))
    return model


@torch.no_grad()
def gathered(model: GPT) -> dict[str, Tensor]:
    """The weights of a divided model as the undivided one has them, on every rank."""
    whole = {n: p.full_tensor() if isinstance(p, DTensor) else p.detach() for n, p in model.named_parameters()}
    first: Any = model.blocks[0]
    n = model.config.heads // first.attention.heads
    names = {id(module): name for name, module in model.named_modules()}
    for block in model.blocks:
        for linear, rows in _cut(block, model.config, n):
            for key, _ in linear.named_parameters():
                name = f"{names[id(linear)]}.{key}"
                whole[name] = whole[name][rows.argsort()]
    return whole


def _cut(block: Any, config: GPTConfig, n: int) -> Iterator[tuple[nn.Linear, Tensor]]:
    """The matrices that hold several side by side, and the order of rows in which each rank's come together: its
    queries, keys and values; its gates and what they open."""
    heads = (config.heads, config.kv_heads, config.kv_heads)
    yield block.attention.qkv, _order([h * config.head_width for h in heads], n)
    yield block.mlp.up, _order([config.mlp_width] * (block.mlp.up.out_features // config.mlp_width), n)


def _order(sizes: list[int], n: int) -> Tensor:
    parts = torch.arange(sum(sizes)).split(sizes)
    return torch.cat([part.chunk(n)[rank] for rank in range(n) for part in parts])


def _summed(gradient: Tensor, mesh: DeviceMesh) -> Tensor:
    gradient = gradient.clone()
    torch.distributed.all_reduce(gradient, group=mesh.get_group())
    return gradient
