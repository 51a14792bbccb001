"""Rotary positions (Su et al. 2021), and the three ways in which they are stretched to longer contexts."""

import math
from typing import Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor


class LinearScaling(BaseModel, frozen=True, extra="forbid"):
    """Every rotation is slowed by `factor` (Chen et al. 2023)."""

    kind: Literal["linear"]
    factor: float = Field(gt=0)


class Llama3Scaling(BaseModel, frozen=True, extra="forbid"):
    """Slow rotations are slowed by `factor`, fast ones kept, those between blended (Llama 3.1)."""

    kind: Literal["llama3"]
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


class YarnScaling(BaseModel, frozen=True, extra="forbid"):
    """YaRN (Peng et al. 2023): the same by turns made within the original context, and logits sharpened."""

    kind: Literal["yarn"]
    factor: float
    original_context: int
    beta_fast: float  # turns from which a rotation is kept
    beta_slow: float  # turns below which it is slowed in full
    attention_factor: float | None  # None: 0.1 ln(factor) + 1 (section 3.4)


Scaling = LinearScaling | Llama3Scaling | YarnScaling


def frequencies(head: int, theta: float, scaling: Scaling | None) -> tuple[Tensor, float]:
    """Radians a position [head/2] of each pair of a head's coordinates, and what cosine and sine are multiplied by."""
    base = theta ** (-torch.arange(0, head, 2, dtype=torch.float32) / head)
    if scaling is None:
        return base, 1.0
    if isinstance(scaling, LinearScaling):
        return base / scaling.factor, 1.0
    if isinstance(scaling, Llama3Scaling):
        turns = scaling.original_context * base / (2 * math.pi)
        blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        kept = blend.clamp(0, 1)
        return base * (kept + (1 - kept) / scaling.factor), 1.0
    low, high = (
        head * math.log(scaling.original_context / (beta * 2 * math.pi)) / (2 * math.log(theta))
        for beta in (scaling.beta_fast, scaling.beta_slow)
    )
    low, high = max(math.floor(low), 0), min(math.ceil(high), head - 1)
    ramp = ((torch.arange(head // 2) - low) / max(high - low, 0.001)).clamp(0, 1)
    factor = scaling.attention_factor
    if factor is None:
        factor = 0.1 * math.log(scaling.factor) + 1 if scaling.factor > 1 else 1.0
    return base * (1 - ramp + ramp / scaling.factor), factor


def tables(length: int, head: int, theta: float, scaling: Scaling | None, device: torch.device) -> Tensor:
    """Cosines and sines [2, length, head/2] of the angles at positions 0..length-1, float32."""
    frequency, factor = frequencies(head, theta, scaling)
    angle = torch.arange(length, dtype=torch.float32)[:, None] * frequency
    return (torch.stack((angle.cos(), angle.sin())) * factor).to(device)


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate the halves of x [B, H, T, head] by rope: cosines and sines [2, T, head/2] or [2, B, 1, T, head/2]."""
    cos, sin = rope.to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    # (a cos - b sin, b cos + a sin) in three passes over all of x: half as long, there and back, as by halves.
    return torch.addcmul(x * torch.cat((cos, cos), dim=-1), torch.cat((b, a), dim=-1), torch.cat((-sin, sin), dim=-1))
