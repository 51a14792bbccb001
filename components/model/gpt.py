"""One readable GPT: options, not subclasses.

The preset `gpt` is the classic decoder (Radford et al. 2019): pre-norm, learned positions, GELU, the head tied to the
token embedding. The other options are its forebear's and heirs': norms behind the layers (Radford et al. 2018), RMSNorm
(Zhang & Sennrich 2019), rotary positions (Su et al. 2021), SwiGLU (Shazeer 2020), squared ReLU (So et al. 2021),
attention and MLP side by side (Chowdhery et al. 2022), grouped-query attention (Ainslie et al. 2023), a sliding window
(Jiang et al. 2023), QK norm, capped logits (Gemma 2, 2024), and the smeared embedding of the speedrun of nanoGPT
(Jordan et al. 2025), a token shift as in RWKV (Peng et al. 2023).
"""

import math
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, Field, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from components.model.attention import attend
from components.model.fused import gelu, nats, squared_relu
from components.model.rotary import Scaling, rotate, tables
from components.model.segments import Segments, attend_each

Mask = Tensor | Segments | None


class Shape(BaseModel, frozen=True, extra="forbid"):
    """The architecture, apart from what the tokenizer (vocab_size) and the use (head) decide."""

    context: int = Field(ge=1)
    layers: int = Field(ge=1)
    width: int = Field(ge=1)
    heads: int = Field(ge=1)
    kv_heads: int = Field(ge=1)  # fewer than heads: grouped queries; 1: multi-query
    head_width: int = Field(ge=1)  # of one head; mostly width / heads
    mlp_width: int = Field(ge=1)
    block: Literal["pre", "post", "parallel"]  # norms before the layers, behind them, or one before both side by side
    norm: Literal["layer", "rms"]
    norm_eps: float = Field(gt=0)
    positions: Literal["learned", "rotary"]
    rope_theta: float = Field(gt=0)
    rope_scaling: Annotated[Scaling, Field(discriminator="kind")] | None
    activation: Literal["gelu", "swiglu", "relu2"]
    window: int | None = Field(ge=1)  # positions that a query sees, itself included; None: all before it
    qk_norm: bool
    bias: Literal["all", "attention", "qkv", "none"]
    tied: bool
    logit_cap: float | None = Field(gt=0)  # logits become cap * tanh(logits / cap)
    smear: bool  # a learned share of the previous token's embedding: one layer fewer to learn to copy
    residual_init: Literal["scaled", "zero"]  # of the projections into the residual stream

    @model_validator(mode="after")
    def _fits(self) -> "Shape":
        if self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} must be a multiple of kv_heads {self.kv_heads}")
        if self.positions == "rotary" and self.head_width % 2:
            raise ValueError(f"head_width {self.head_width} must be even: rotary positions turn pairs")
        return self


class GPTConfig(Shape, frozen=True, extra="forbid"):
    vocab_size: int = Field(ge=1)
    head: Literal["lm", "scalar"]


class KVCache:
    """Static keys and values of `batch` sequences of up to `length` positions; `filled` of the longest hold something.

    A token's slot is its position. Sequences of several lengths are filled together from the left, padded behind; what
    the padding leaves in the slots of a shorter one is masked until that sequence's own tokens overwrite it.
    """

    def __init__(self, config: GPTConfig, batch: int, length: int, like: Tensor) -> None:
        shape = (config.layers, batch, config.kv_heads, length, config.head_width)
        self.k = torch.zeros(shape, dtype=like.dtype, device=like.device)
        self.v = torch.zeros(shape, dtype=like.dtype, device=like.device)
        self.filled = 0
        self.last: Tensor | None = None  # [B, 1] the newest token, for the smear of the one behind it

    def append(self, layer: int, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v [B, kv_heads, T, head] at `positions` ([T], the next ones for all, or [B, T], each row's own) and
        return all keys and values so far."""
        end = self.filled + k.shape[2]
        if positions.dim() == 1:
            self.k[layer, :, :, self.filled : end] = k
            self.v[layer, :, :, self.filled : end] = v
        else:
            at = positions[:, None, :, None].expand_as(k)
            self.k[layer].scatter_(2, at, k.to(self.k.dtype))
            self.v[layer].scatter_(2, at, v.to(self.v.dtype))
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]

    def grow(self, length: int) -> None:
        """Make room for `length` positions, the slots so far kept in place."""
        more = length - self.k.shape[3]
        if more > 0:
            self.k, self.v = (F.pad(x, (0, 0, 0, more)) for x in (self.k, self.v))

    def keep(self, rows: Tensor) -> None:
        """Drop every sequence but `rows` (indices): finished ones leave the batch."""
        self.k, self.v = self.k[:, rows], self.v[:, rows]
        self.last = None if self.last is None else self.last[rows]


def make_norm(config: Shape, width: int) -> nn.Module:
    if config.norm == "rms":
        return nn.RMSNorm(width, eps=config.norm_eps)
    return nn.LayerNorm(width, eps=config.norm_eps, bias=config.bias == "all")


class Attention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head = config.heads, config.kv_heads, config.head_width
        self.window = config.window
        rows = (config.heads + 2 * config.kv_heads) * self.head
        self.qkv = nn.Linear(config.width, rows, bias=config.bias != "none")
        self.out = nn.Linear(config.heads * self.head, config.width, bias=config.bias in ("all", "attention"))
        self.q_norm = make_norm(config, self.head) if config.qk_norm else nn.Identity()
        self.k_norm = make_norm(config, self.head) if config.qk_norm else nn.Identity()

    def forward(
        self, x: Tensor, positions: Tensor, rope: Tensor | None, mask: Mask, cache: KVCache | None, layer: int
    ) -> Tensor:
        B, T, _ = x.shape
        q, k, v = self.qkv(x).split([n * self.head for n in (self.heads, self.kv_heads, self.kv_heads)], dim=-1)
        q = self.q_norm(q.view(B, T, self.heads, self.head)).transpose(1, 2)
        k = self.k_norm(k.view(B, T, self.kv_heads, self.head)).transpose(1, 2)
        v = v.view(B, T, self.kv_heads, self.head).transpose(1, 2)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        if cache is not None:
            k, v = cache.append(layer, k, v, positions)
        if isinstance(mask, Segments):
            y = attend_each(q, k, v, mask, self.window)
        else:
            y = attend(q, k, v, mask, self.window)
        return self.out(y.transpose(1, 2).reshape(B, T, self.heads * self.head))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.activation = config.activation
        gates = 2 if config.activation == "swiglu" else 1
        self.up = nn.Linear(config.width, gates * config.mlp_width, bias=config.bias == "all")
        self.down = nn.Linear(config.mlp_width, config.width, bias=config.bias == "all")

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        if self.activation == "swiglu":
            gate, x = x.chunk(2, dim=-1)
            return self.down(F.silu(gate) * x)
        return self.down(gelu(x) if self.activation == "gelu" else squared_relu(x))


class Block(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.kind = config.block
        self.norm1, self.attention = make_norm(config, config.width), Attention(config)
        self.norm2 = make_norm(config, config.width) if config.block != "parallel" else nn.Identity()
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, positions: Tensor, rope: Tensor | None, mask: Mask, cache: KVCache | None, layer: int
    ) -> Tensor:
        if self.kind == "post":
            x = self.norm1(x + self.attention(x, positions, rope, mask, cache, layer))
            return self.norm2(x + self.mlp(x))
        normed = self.norm1(x)
        if self.kind == "parallel":
            return x + self.attention(normed, positions, rope, mask, cache, layer) + self.mlp(normed)
        x = x + self.attention(normed, positions, rope, mask, cache, layer)
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Tokens [B, T] to next-token logits [B, T, vocab] (head "lm") or one value each [B, T] ("scalar"), in float32."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute = False  # in training, keep the blocks' inputs alone and compute the rest again on the way back
        self._angles: Tensor | None = None
        self.wte = nn.Embedding(config.vocab_size, config.width)
        self.wpe = nn.Embedding(config.context, config.width) if config.positions == "learned" else None
        self.smear = nn.Parameter(torch.zeros(config.width)) if config.smear else None
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.layers)])
        self.norm = make_norm(config, config.width) if config.block != "post" else nn.Identity()
        if config.head == "scalar":
            self.head = nn.Linear(config.width, 1)
        else:
            self.head = nn.Linear(config.width, config.vocab_size, bias=False)
            if config.tied:
                self.head.weight = self.wte.weight
        self.apply(self._init)
        # Projections into the residual stream start smaller, so its variance does not grow with depth (GPT-2).
        deviation = 0.02 / math.sqrt(2 * config.layers) if config.residual_init == "scaled" else 0.0
        for name, p in self.named_parameters():
            if name.endswith(("out.weight", "down.weight")):
                nn.init.normal_(p, std=deviation)

    @staticmethod
    def _init(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def rope(self, positions: Tensor) -> Tensor | None:
        """Cosines and sines of rotary positions [T] or [B, T], as `rotate` takes them; None for learned ones."""
        c = self.config
        if c.positions == "learned":
            return None
        if self._angles is None or self._angles.device != positions.device:
            self._angles = tables(c.context, c.head_width, c.rope_theta, c.rope_scaling, positions.device)
        angles = self._angles[:, positions]
        return angles if positions.dim() == 1 else angles.unsqueeze(2)

    def hidden(
        self, ids: Tensor, *, positions: Tensor | None = None, mask: Mask = None, cache: KVCache | None = None
    ) -> Tensor:
        """The last layer's normed states [B, T, width].

        positions: [T], default the next ones behind what the cache holds, or [B, T], each row's own. mask: boolean,
        broadcast to [B, heads, T, S], S being all that the cache then holds, True where a query may look; None: causal;
        or the documents of each row (segments.py), which bring their own positions.
        Raises ValueError where the tokens do not fit the context.
        """
        T, window = ids.shape[1], self.config.window
        start = cache.filled if cache is not None else 0
        if isinstance(mask, Segments):
            positions = mask.positions
        if positions is None:
            if start + T > self.config.context:
                raise ValueError(f"{start + T} tokens do not fit the context of {self.config.context}")
            positions = torch.arange(start, start + T, device=ids.device)
        if start and mask is None and (T > 1 or positions.dim() == 2):  # otherwise all slots are seen, or a triangle
            slots = torch.arange(start + T, device=ids.device)
            at = positions.unsqueeze(-1) if positions.dim() == 1 else positions[:, None, :, None]
            mask = slots <= at
            if window is not None:
                mask &= slots > at - window
        x = self.wte(ids)
        if self.smear is not None:
            first = ids[:, :1] if cache is None or cache.last is None else cache.last
            before = torch.cat((first, ids[:, :-1]), dim=1)
            x = x + self.wte(before) * self.smear * (positions > 0)[..., None]  # a text's first token has none before
        if self.wpe is not None:
            x = x + self.wpe(positions)
        rope = self.rope(positions)
        for layer, block in enumerate(self.blocks):
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, positions, rope, mask, cache, layer, use_reentrant=False)
            else:
                x = block(x, positions, rope, mask, cache, layer)
        if cache is not None:
            cache.filled += T
            cache.last = ids[:, -1:]
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """What the head says of normed states [..., width]: float32 [..., vocab], or [...] values."""
        y = self.head(hidden).float()
        if self.config.head == "scalar":
            return y.squeeze(-1)
        cap = self.config.logit_cap
        return y if cap is None else cap * torch.tanh(y / cap)

    def forward(
        self,
        ids: Tensor,
        *,
        positions: Tensor | None = None,
        mask: Mask = None,
        cache: KVCache | None = None,
        at: Tensor | None = None,
        targets: Tensor | None = None,
        temperature: float = 1.0,
    ) -> Tensor:
        """With `at` [B, T] boolean, the n positions where it is True alone, as [n, vocab] or [n]: a head costs most.

        With `targets`, token ids [B, T], or [n] with `at`, minus the log-probability of each instead, in nats: the
        logits themselves are never kept in float32, which is faster and takes less memory. They are divided by
        `temperature`.
        """
        hidden = self.hidden(ids, positions=positions, mask=mask, cache=cache)
        hidden = hidden if at is None else hidden[at]
        return self.logits(hidden) if targets is None else self.nats(hidden, targets, temperature)

    def nats(self, hidden: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
        """-log softmax(logits / temperature)[target] of normed states [..., width] and their targets [...]."""
        if self.config.logit_cap is not None:
            logits = self.logits(hidden).flatten(0, -2) / temperature
            return F.cross_entropy(logits, targets.flatten(), reduction="none").view_as(targets)
        hidden = hidden if temperature == 1 else hidden / temperature
        return nats(hidden.flatten(0, -2), self.head.weight, targets.flatten()).view_as(targets)


def parameter_count(model: nn.Module) -> int:
    """Parameters, a tied tensor counted once."""
    return sum(p.numel() for p in model.parameters())
