"""A model made ready to generate: the same sums as gpt.py, over weights laid out once for the kernels that read them.

A decoding step is many small products, so what counts is how fast the weights come from memory and how little is done
between them. On the CPU the matrices are packed for oneDNN, with bias, GELU and residual taken into the product. These
kernels give a row the same bits whatever rows stand beside it, and the attention here is cut to blocks of 16 positions,
which does the same for lengths: a request's text does not depend on its batch. tests/model/test_generate.py holds this.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.model.gpt import GPT, GPTConfig, KVCache
from components.model.rotary import rotate, tables

BLOCK = 16  # slots are read in multiples of this: what is masked behind them adds exact zeros, in the same order
SMALL = 400  # multiplications of a product below which PyTorch takes another kernel, which rounds otherwise
SCORES = 1 << 25  # attention scores held at once while prompts are read
Norm = Callable[[Tensor], Tensor]
Linear = Callable[..., Tensor]  # (x [N, in], residual [N, out] | None) -> [N, out]


class Layer(NamedTuple):
    norm1: Norm
    qkv: Linear
    q_norm: Norm
    k_norm: Norm
    out: Linear
    norm2: Norm
    up: Linear
    down: Linear


class Decoder:
    """Reads tokens with a cache like GPT.hidden and GPT.logits, without gradients.

    It holds the weights as they were when it was made: make another after a training step. With `alone` a batch of one
    takes kernels made for one row, which round otherwise: faster, but its text may then differ from the same request's
    in a batch.
    """

    def __init__(self, model: GPT, dtype: torch.dtype | None = None, alone: bool = False) -> None:
        c = self.config = model.config
        self.device = model.wte.weight.device
        self.dtype = dtype or model.wte.weight.dtype
        self.alone = alone
        # torchao's tensors cannot be aliased in inference mode, which saves a little at every operation
        self.guard = torch.inference_mode if all(map(_is_plain, model.parameters())) else torch.no_grad
        with self.guard():
            self.wte, self.wpe = self._plain(model.wte.weight), self._plain(model.wpe.weight) if model.wpe else None
            self.smear = self._plain(model.smear)
            self.layers = [self._layer(block) for block in model.blocks]
            self.norm = self._norm(model.norm)
            self.head = self._linear(model.head)
            rotary = c.positions == "rotary"
            self.angles = (
                tables(c.context, c.head_width, c.rope_theta, c.rope_scaling, self.device).to(self.dtype)
                if rotary
                else None
            )

    def _plain(self, p: Any) -> Any:
        """A tensor in our type; a quantized one stays as it is."""
        return p.detach().to(self.dtype) if p is not None and _is_plain(p) else p

    def _layer(self, block: Any) -> Layer:
        a, m = block.attention, block.mlp
        gelu = m.activation == "gelu"
        norms = [self._norm(n) for n in (block.norm1, a.q_norm, a.k_norm, block.norm2)]
        down, up = self._linear(m.down), self._linear(m.up, "gelu" if gelu else "none")
        return Layer(norms[0], self._linear(a.qkv), norms[1], norms[2], self._linear(a.out), norms[3], up, down)

    def _norm(self, norm: nn.Module) -> Norm:
        if isinstance(norm, nn.Identity):
            return lambda x: x
        weight, bias, eps = self._plain(norm.weight), self._plain(getattr(norm, "bias", None)), self.config.norm_eps
        shape = tuple(weight.shape)
        if isinstance(norm, nn.RMSNorm):
            return lambda x: F.rms_norm(x, shape, weight, eps)
        return lambda x: F.layer_norm(x, shape, weight, bias, eps)

    def _linear(self, linear: nn.Linear, activation: str = "none") -> Linear:
        weight, bias = self._plain(linear.weight), self._plain(linear.bias)
        alone_in_bf16 = self.alone and self.dtype == torch.bfloat16
        if _is_plain(weight) and packs(self.device, self.dtype) and not alone_in_bf16:
            return packed(weight, bias, activation, doubled=self.dtype == torch.float32 and not self.alone)

        def plain(x: Tensor, residual: Tensor | None = None) -> Tensor:
            y = F.linear(x, weight, bias)
            if activation == "gelu":
                y = F.gelu(y, approximate="tanh")
            return y if residual is None else y.add_(residual)

        return plain

    def cache(self, batch: int, length: int) -> KVCache:
        """An empty cache for `batch` sequences of up to `length` tokens."""
        whole = -(-length // BLOCK) * BLOCK
        first = 0 if self.device.type == "cpu" else whole  # on the CPU it grows with what it holds
        return KVCache(self.config, batch, first, torch.empty(0, dtype=self.dtype, device=self.device))

    def hidden(self, ids: Tensor, *, cache: KVCache, positions: Tensor | None = None) -> Tensor:
        """The last layer's normed states [B, T, width] of the next tokens; positions [B, 1] where rows are ragged."""
        with self.guard(), self._kernels(ids.numel()):
            return self._hidden(ids, cache, positions)

    def _hidden(self, ids: Tensor, cache: KVCache, positions: Tensor | None) -> Tensor:
        B, T = ids.shape
        start = cache.filled
        at = torch.arange(start, start + T, device=ids.device) if positions is None else positions
        x, rope = self._embedded(ids, at, cache.last)
        span = Span(self.config, cache, at, B, T)
        x = x.view(B * T, -1)
        for number, layer in enumerate(self.layers):
            x = self._block(x, layer, number, rope, span)
        cache.filled += T
        cache.last = ids[:, -1:]
        return self.norm(x).view(B, T, -1)

    def _embedded(self, ids: Tensor, at: Tensor, last: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What goes into the first layer [B, T, width], and the angles of its positions `at`; `last` [B, 1] is the
        token before `ids`, None where there is none."""
        x = F.embedding(ids, self.wte)
        if self.smear is not None:
            before = F.embedding(torch.cat((ids[:, :1] if last is None else last, ids[:, :-1]), dim=1), self.wte)
            x = x + before * self.smear * (at > 0)[..., None]
        if self.wpe is not None:
            x = x + F.embedding(at, self.wpe)
        if self.angles is None:
            return x, None
        rope = self.angles[:, at]
        return x, rope if at.dim() == 1 else rope.unsqueeze(2)

    def _block(self, x: Tensor, layer: Layer, number: int, rope: Tensor | None, span: "Span") -> Tensor:
        if self.config.block == "post":
            x = layer.norm1(layer.out(self._attention(x, layer, number, rope, span), x))
            return layer.norm2(layer.down(self._up(x, layer), x))
        normed = layer.norm1(x)
        x = layer.out(self._attention(normed, layer, number, rope, span), x)
        return layer.down(self._up(normed if self.config.block == "parallel" else layer.norm2(x), layer), x)

    def _up(self, x: Tensor, layer: Layer) -> Tensor:
        x = layer.up(x)
        if self.config.activation == "swiglu":
            gate, x = x.chunk(2, dim=-1)
            return F.silu(gate) * x
        return x if self.config.activation == "gelu" else F.relu(x).square()

    def _heads(self, x: Tensor, layer: Layer, rope: Tensor | None, B: int, T: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, heads, T, head width] of the states x [B * T, width], turned."""
        c = self.config
        qkv = layer.qkv(x).view(B, T, c.heads + 2 * c.kv_heads, c.head_width)
        q, k, v = qkv.split([c.heads, c.kv_heads, c.kv_heads], dim=2)
        q, k, v = layer.q_norm(q).transpose(1, 2), layer.k_norm(k).transpose(1, 2), v.transpose(1, 2)
        return (q, k, v) if rope is None else (rotate(q, rope), rotate(k, rope), v)

    def _attention(self, x: Tensor, layer: Layer, number: int, rope: Tensor | None, span: "Span") -> Tensor:
        c, B, T = self.config, span.B, span.T
        q, k, v = self._heads(x, layer, rope, B, T)
        k, v = span.store(number, k, v)
        y = attend(q.reshape(B * c.kv_heads, -1, c.head_width), k, v, span.mask)
        y = y.view(B, c.heads, T, c.head_width)
        return y.transpose(1, 2).reshape(B * T, c.heads * c.head_width)

    @contextmanager
    def _kernels(self, rows: int) -> Iterator[None]:
        """One row in bfloat16 and alone: PyTorch's own product reads weights 1.5 times as fast as oneDNN's."""
        native = self.alone and rows == 1 and self.dtype == torch.bfloat16 and self.device.type == "cpu"
        was = torch.backends.mkldnn.set_flags(_enabled=not native)[0]
        try:
            yield
        finally:
            torch.backends.mkldnn.set_flags(_enabled=was)

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 [N, vocab] of normed states [N, width]."""
        with self.guard(), self._kernels(len(hidden)):
            y = self.head(hidden).float()
        cap = self.config.logit_cap
        return y if cap is None else cap * torch.tanh(y / cap)

    def chunk(self, batch: int, length: int) -> int:
        """How many tokens of each prompt to read at once: bounded memory, whatever the prompts' length."""
        fits = SCORES // (batch * self.config.heads * length)
        return max(BLOCK, fits // BLOCK * BLOCK)


class Span:
    """Which slots of the cache the next T tokens of B rows are written to, and which they may see."""

    def __init__(self, config: GPTConfig, cache: KVCache, at: Tensor, B: int, T: int) -> None:
        self.cache, self.B, self.T = cache, B, T
        self.start, self.end = cache.filled, cache.filled + T
        if at.device.type == "cpu":
            block = BLOCK * -(-SMALL // (BLOCK * config.head_width))
            cache.grow(-(-self.end // block) * block)
        length = cache.k.shape[3]
        self.flat: Tensor | None = None
        if at.dim() == 2:  # ragged: each row's own slot, as rows of the cache seen as one table
            heads = torch.arange(B * config.kv_heads, device=at.device).view(B, config.kv_heads)
            self.flat = (heads * length + at).flatten()
        slots, where = torch.arange(length, device=at.device), at.view(-1, T, 1)
        hidden = slots > where
        if config.window is not None:
            hidden |= slots <= where - config.window
        mask = torch.zeros(hidden.shape, dtype=cache.k.dtype, device=at.device).masked_fill_(hidden, -torch.inf)
        groups = config.heads // config.kv_heads
        if len(mask) > 1:
            mask = mask.repeat_interleave(config.kv_heads, dim=0)
        if T > 1:
            mask = mask.repeat(1, groups, 1)
        self.mask = mask.expand(B * config.kv_heads, groups * T, length)

    def store(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v [B, kv_heads, T, head] into their slots; all there are, as [B * kv_heads, length, head]."""
        both = []
        for stored, new in ((self.cache.k[layer], k), (self.cache.v[layer], v)):
            width = stored.shape[3]
            if self.flat is None:
                stored[:, :, self.start : self.end] = new
            else:
                stored.view(-1, width).index_copy_(0, self.flat, new.reshape(-1, width))
            both.append(stored.flatten(0, 1))
        return both[0], both[1]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(head) + mask) v of q [N, n, head], k and v [N, S, head], mask [N, n, S].

    By plain products on the CPU: over whole blocks in memory they are faster than the fused kernel for few queries (256
    rows of 12 heads, 64 positions: 2 ms for 7 in float32, 13 in bfloat16), and they sum a row in one order whatever N
    and S are, which the fused kernel does not.
    """
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask[None])[0]
    scores = torch.bmm(q * q.shape[-1] ** -0.5, k.mT).add_(mask)
    return torch.bmm(scores.softmax(-1), v)


class Graph:
    """One decoding step of a batch recorded on a GPU and replayed, so that Python no longer starts its kernels.

    Not tried on a GPU yet. It serves one cache of one batch; a row's place in the cache comes as a tensor.
    """

    def __init__(self, decoder: Decoder, cache: KVCache, ids: Tensor, positions: Tensor) -> None:
        self.cache, self.ids, self.positions = cache, ids.clone(), positions.clone()
        self.before = ids.clone() if cache.last is None else cache.last.clone()
        self.graph = torch.cuda.CUDAGraph()
        filled = cache.filled

        def step() -> Tensor:
            cache.filled, cache.last = filled, self.before
            return decoder.logits(decoder.hidden(self.ids, positions=self.positions, cache=cache)[:, -1])

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # allocations and choices of kernels happen here; it writes what is right
            for _ in range(2):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(self.graph):
            self.logits = step()

    def __call__(self, ids: Tensor, positions: Tensor) -> Tensor:
        """The logits behind the next tokens [B, 1]; the tensor is overwritten by the next call."""
        self.ids.copy_(ids)
        self.positions.copy_(positions)
        self.graph.replay()
        self.before.copy_(ids)
        return self.logits


def _is_plain(p: Any) -> bool:
    return type(p) in (Tensor, nn.Parameter)


def packs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN's packed products serve this device and type."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def packed(weight: Tensor, bias: Tensor | None, activation: str, doubled: bool) -> Linear:
    """x W^T + b with W in oneDNN's own order, then `activation` or a residual.

    doubled: a single row goes through twice, because for one row alone float32 has another kernel, which rounds
    otherwise. bfloat16 has one kernel for all.
    """
    product, with_sum = torch.ops.mkldnn._linear_pointwise.default, torch.ops.mkldnn._linear_pointwise.binary
    order = torch.ops.mkldnn._reorder_linear_weight(weight, 64)
    how = "tanh" if activation == "gelu" else ""

    def linear(x: Tensor, residual: Tensor | None = None) -> Tensor:
        if doubled and len(x) == 1:
            x = x.expand(2, -1).contiguous()
            return linear(x, None if residual is None else residual.expand(2, -1).contiguous())[:1]
        if residual is not None:
            return with_sum(x, residual, order, bias, "add")
        return product(x, order, bias, activation, [], how)

    return linear
