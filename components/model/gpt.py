"""One readable GPT: options, not subclasses.

The preset `gpt` is the classic decoder (Radford et al. 2019): pre-norm, learned positions, GELU, the head tied to the
token embedding. The other options are its heirs': RMSNorm (Zhang & Sennrich 2019), rotary positions (Su et al. 2021),
SwiGLU (Shazeer 2020), squared ReLU (So et al. 2021), grouped-query attention (Ainslie et al. 2023), QK norm, and the
smeared embedding of the speedrun of nanoGPT (Jordan et al. 2025), a token shift as in RWKV (Peng et al. 2023).
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel
from torch import Tensor, nn

SHORT = 512  # positions up to which a T x T matrix is no worry


class Shape(BaseModel, frozen=True, extra="forbid"):
    """The architecture, apart from what the tokenizer (vocab_size) and the use (head) decide."""

    context: int
    layers: int
    width: int
    heads: int
    kv_heads: int
    mlp_width: int
    norm: Literal["layer", "rms"]
    positions: Literal["learned", "rotary"]
    activation: Literal["gelu", "swiglu", "relu2"]
    qk_norm: bool
    bias: bool
    tied: bool
    rope_theta: float
    smear: bool  # a learned share of the previous token's embedding: one layer fewer to learn to copy


class GPTConfig(Shape, frozen=True, extra="forbid"):
    vocab_size: int
    head: Literal["lm", "scalar"]


class KVCache:
    """Static keys and values of `batch` sequences of up to `length` positions; `filled` of them hold something."""

    def __init__(self, config: GPTConfig, batch: int, length: int, like: Tensor) -> None:
        shape = (config.layers, batch, config.kv_heads, length, config.width // config.heads)
        self.k = torch.zeros(shape, dtype=like.dtype, device=like.device)
        self.v = torch.zeros(shape, dtype=like.dtype, device=like.device)
        self.filled = 0
        self.last: Tensor | None = None  # [B, 1] the newest token, for the smear of the one behind it

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v [B, kv_heads, T, head] behind what is filled; return all keys and values so far."""
        end = self.filled + k.shape[2]
        self.k[layer, :, :, self.filled : end] = k
        self.v[layer, :, :, self.filled : end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]

    def keep(self, rows: Tensor) -> None:
        """Drop every sequence but `rows` (indices): finished ones leave the batch."""
        self.k, self.v = self.k[:, rows], self.v[:, rows]
        self.last = None if self.last is None else self.last[rows]


def make_norm(config: Shape, width: int) -> nn.Module:
    if config.norm == "rms":
        return nn.RMSNorm(width, eps=1e-5)
    return nn.LayerNorm(width, eps=1e-5, bias=config.bias)


def rotary(positions: Tensor, head: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin [..., T, head/2] of the rotation angles at `positions` [..., T]."""
    frequency = theta ** (-torch.arange(0, head, 2, device=positions.device, dtype=torch.float32) / head)
    angle = positions[..., None].float() * frequency
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves of x [B, H, T, head] by the angles [B or 1, T, head/2]."""
    cos, sin = cos.unsqueeze(-3).to(x.dtype), sin.unsqueeze(-3).to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(head)) v [B, H, T, head]; causal where `mask` is None. k and v may have fewer heads.

    Short rows in bfloat16 on a CPU go through plain batched products: a training step of the demo takes 62 ms instead
    of 82, because the fused kernel's backward is slow there. Everywhere else the fused kernel is faster or equal, and
    it never holds T x T.
    """
    B, H, T, head = q.shape
    short = mask is None and 1 < T <= SHORT and k.shape[1] == H and k.shape[2] == T
    if not (short and q.dtype == torch.bfloat16 and q.device.type == "cpu"):
        grouped = k.shape[1] != H
        causal = mask is None and T > 1
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)
    q, k, v = (x.reshape(B * H, T, head) for x in (q, k, v.to(q.dtype)))
    with torch.autocast("cpu", enabled=False):  # its softmax would go through float32 and back
        hidden = torch.full((T, T), -torch.inf, dtype=q.dtype).triu(1)
        scores = torch.baddbmm(hidden, q, k.mT, alpha=head**-0.5)
        return torch.bmm(scores.softmax(-1), v).view(B, H, T, head)


class Attention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.kv_heads
        self.head = config.width // config.heads
        self.qkv = nn.Linear(config.width, (config.heads + 2 * config.kv_heads) * self.head, bias=config.bias)
        self.out = nn.Linear(config.heads * self.head, config.width, bias=config.bias)
        self.q_norm = make_norm(config, self.head) if config.qk_norm else nn.Identity()
        self.k_norm = make_norm(config, self.head) if config.qk_norm else nn.Identity()

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor] | None, mask: Tensor | None, cache: KVCache | None, layer: int
    ) -> Tensor:
        B, T, _ = x.shape
        q, k, v = self.qkv(x).split([n * self.head for n in (self.heads, self.kv_heads, self.kv_heads)], dim=-1)
        q = self.q_norm(q.view(B, T, self.heads, self.head)).transpose(1, 2)
        k = self.k_norm(k.view(B, T, self.kv_heads, self.head)).transpose(1, 2)
        v = v.view(B, T, self.kv_heads, self.head).transpose(1, 2)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        y = attend(q, k, v, mask)
        return self.out(y.transpose(1, 2).reshape(B, T, self.heads * self.head))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.activation = config.activation
        gates = 2 if config.activation == "swiglu" else 1
        self.up = nn.Linear(config.width, gates * config.mlp_width, bias=config.bias)
        self.down = nn.Linear(config.mlp_width, config.width, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        if self.activation == "swiglu":
            gate, x = x.chunk(2, dim=-1)
            return self.down(F.silu(gate) * x)
        return self.down(F.gelu(x, approximate="tanh") if self.activation == "gelu" else F.relu(x).square())


class Block(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.norm1, self.attention = make_norm(config, config.width), Attention(config)
        self.norm2, self.mlp = make_norm(config, config.width), MLP(config)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor] | None, mask: Tensor | None, cache: KVCache | None, layer: int
    ) -> Tensor:
        x = x + self.attention(self.norm1(x), rope, mask, cache, layer)
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Tokens [B, T] to next-token logits [B, T, vocab] (head "lm") or one value each [B, T] ("scalar"), in float32."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        if config.width % config.heads or config.heads % config.kv_heads:
            raise ValueError(
                f"width {config.width} must divide by heads {config.heads}, and heads by kv_heads {config.kv_heads}"
            )
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.width)
        self.wpe = nn.Embedding(config.context, config.width) if config.positions == "learned" else None
        self.smear = nn.Parameter(torch.zeros(config.width)) if config.smear else None
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.layers)])
        self.norm = make_norm(config, config.width)
        if config.head == "scalar":
            self.head = nn.Linear(config.width, 1)
        else:
            self.head = nn.Linear(config.width, config.vocab_size, bias=False)
            if config.tied:
                self.head.weight = self.wte.weight
        self.apply(self._init)
        # Projections into the residual stream start smaller, so its variance does not grow with depth (GPT-2).
        for name, p in self.named_parameters():
            if name.endswith(("out.weight", "down.weight")):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.layers))

    @staticmethod
    def _init(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def hidden(
        self, ids: Tensor, *, positions: Tensor | None = None, mask: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """The last layer's normed states [B, T, width].

        positions: [T] or [B, T], default 0..T-1 (behind the cache's filled part). mask: boolean, broadcast to
        [B, heads, T, T_all], True where a query may look; None is causal, which needs an empty cache or T = 1.
        """
        T = ids.shape[1]
        start = cache.filled if cache is not None else 0
        if positions is None:
            if start + T > self.config.context:
                raise ValueError(f"{start + T} tokens do not fit the context of {self.config.context}")
            positions = torch.arange(start, start + T, device=ids.device)
        x = self.wte(ids)
        if self.smear is not None:
            first = ids[:, :1] if cache is None or cache.last is None else cache.last
            before = torch.cat((first, ids[:, :-1]), dim=1)
            # A text's first token has none before it; padding on the left is not text.
            x = x + self.wte(before) * self.smear * (positions > 0)[..., None]
        rope = None
        if self.wpe is not None:
            x = x + self.wpe(positions)
        else:
            rope = rotary(positions, self.config.width // self.config.heads, self.config.rope_theta)
        for layer, block in enumerate(self.blocks):
            x = block(x, rope, mask, cache, layer)
        if cache is not None:
            cache.filled += T
            cache.last = ids[:, -1:]
        return self.norm(x)

    def forward(
        self,
        ids: Tensor,
        *,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        at: Tensor | None = None,
    ) -> Tensor:
        """With `at` [B, T] boolean, the n positions where it is True alone, as [n, vocab] or [n]: a head costs most."""
        hidden = self.hidden(ids, positions=positions, mask=mask, cache=cache)
        y = self.head(hidden if at is None else hidden[at]).float()
        return y.squeeze(-1) if self.config.head == "scalar" else y


def parameter_count(model: nn.Module) -> int:
    """Parameters, a tied tensor counted once."""
    return sum(p.numel() for p in model.parameters())
