"""Each option of the GPT against its definition, and all of them with a cache."""

import pytest
import torch
from torch import Tensor

from components.model.gpt import GPT, Block, GPTConfig, KVCache, Shape
from components.model.rotary import Llama3Scaling, YarnScaling, frequencies

CHANGES = {
    "post": {"block": "post"},
    "parallel": {"block": "parallel"},
    "window": {"window": 4},
    "capped": {"logit_cap": 2.0},
    "wide heads": {"head_width": 12},
    "window, grouped, rotary": {"window": 3, "kv_heads": 1, "positions": "rotary", "norm": "rms", "bias": "none"},
    "qkv bias": {"bias": "qkv", "positions": "rotary", "norm": "rms"},
}


def changed(config: GPTConfig, change: dict) -> GPTConfig:
    return GPTConfig.model_validate(config.model_dump() | change)


def loud(config: GPTConfig) -> GPT:
    """A model whose every parameter shows in its logits: no zero biases, no small projections."""
    model = GPT(config).eval()
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return model


@pytest.mark.parametrize("name", CHANGES)
def test_a_cache_changes_nothing(name: str, tiny: GPTConfig) -> None:
    model = loud(changed(tiny, CHANGES[name]))
    ids = torch.randint(0, 40, (2, 14))
    cache = KVCache(model.config, 2, 14, model.wte.weight)
    with torch.no_grad():
        whole = model(ids)
        parts = [model(ids[:, :5], cache=cache), model(ids[:, 5:9], cache=cache)]  # several tokens behind a filled one
        parts += [model(ids[:, t : t + 1], cache=cache) for t in range(9, 14)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CHANGES)
def test_ragged_rows_in_a_cache_are_as_each_alone(name: str, tiny: GPTConfig) -> None:
    """Prompts of 3, 7 and 5 tokens are filled in together and go on by four tokens each, at positions of their own."""
    model = loud(changed(tiny, CHANGES[name]))
    lengths = torch.tensor([3, 7, 5])
    rows = [torch.randint(0, 40, (1, n + 4)) for n in lengths.tolist()]
    padded = torch.zeros(3, 7, dtype=torch.long)
    for i, n in enumerate(lengths.tolist()):
        padded[i, :n] = rows[i][0, :n]
    cache = KVCache(model.config, 3, 11, model.wte.weight)
    with torch.no_grad():
        first = model(padded, cache=cache)
        later = []
        for t in range(4):
            token = torch.stack([row[0, n + t] for row, n in zip(rows, lengths.tolist(), strict=True)])
            later.append(model(token[:, None], positions=(lengths + t)[:, None], cache=cache))
        for i, n in enumerate(lengths.tolist()):
            want = model(rows[i])[0]
            torch.testing.assert_close(first[i, :n], want[:n], atol=1e-5, rtol=1e-5)
            got = torch.stack([step[i, 0] for step in later])
            torch.testing.assert_close(got, want[n:], atol=1e-5, rtol=1e-5)


def test_the_three_kinds_of_block(tiny: GPTConfig) -> None:
    """Radford et al. 2019: x + f(norm x); 2018: norm(x + f(x)); Chowdhery et al. 2022: both from one norm."""
    x, at = torch.randn(2, 6, 16), torch.arange(6)

    def parts(kind: str) -> tuple[Block, Tensor]:
        torch.manual_seed(1)
        block = Block(changed(tiny, {"block": kind}))
        return block, block(x, at, None, None, None, 0)

    def attention(block: Block, x: Tensor) -> Tensor:
        return block.attention(x, at, None, None, None, 0)

    b, got = parts("pre")
    y = x + attention(b, b.norm1(x))
    torch.testing.assert_close(got, y + b.mlp(b.norm2(y)))
    b, got = parts("post")
    y = b.norm1(x + attention(b, x))
    torch.testing.assert_close(got, b.norm2(y + b.mlp(y)))
    b, got = parts("parallel")
    torch.testing.assert_close(got, x + attention(b, b.norm1(x)) + b.mlp(b.norm1(x)))
    assert not list(b.norm2.parameters())


def test_a_window_ends_what_a_layer_sees(tiny: GPTConfig) -> None:
    """Two layers of window 4 reach six positions back, and no more."""
    model = loud(changed(tiny, {"window": 4}))
    ids = torch.randint(0, 40, (1, 12))
    near, far = ids.clone(), ids.clone()
    near[0, 5] = (near[0, 5] + 1) % 40
    far[0, 4] = (far[0, 4] + 1) % 40
    with torch.no_grad():
        last, near_last, far_last = (model(x)[0, -1] for x in (ids, near, far))
    assert torch.equal(last, far_last)
    assert not torch.allclose(last, near_last)


def test_capped_logits(tiny: GPTConfig) -> None:
    free, capped = (loud(changed(tiny, {"logit_cap": cap})) for cap in (None, 2.0))
    capped.load_state_dict(free.state_dict())
    ids = torch.randint(0, 40, (1, 9))
    torch.testing.assert_close(capped(ids), 2 * torch.tanh(free(ids) / 2))
    assert free(ids).abs().max() > 2 > capped(ids).abs().max()


def test_biases_stand_where_they_are_asked_for(tiny: GPTConfig) -> None:
    names = {
        bias: {n for n, _ in GPT(changed(tiny, {"bias": bias})).named_parameters() if "bias" in n}
        for bias in ("all", "qkv", "none")
    }
    assert names["none"] == set()
    assert names["qkv"] == {f"blocks.{i}.attention.qkv.bias" for i in range(2)}
    assert len(names["all"]) == 2 * 6 + 1  # two norms and four projections a block, the last norm


def test_zero_projections_make_a_block_the_identity(tiny: GPTConfig) -> None:
    model = GPT(changed(tiny, {"residual_init": "zero"}))
    x = torch.randn(1, 4, 16)
    assert torch.equal(model.blocks[0](x, torch.arange(4), None, None, None, 0), x)


def test_recomputing_changes_no_gradient(tiny: GPTConfig) -> None:
    model, ids = GPT(tiny), torch.randint(0, 40, (2, 8))
    model(ids).logsumexp(-1).sum().backward()
    want = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.recompute = True
    model(ids).logsumexp(-1).sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and torch.equal(p.grad, want[name]), name


def test_scaled_rotations_by_hand() -> None:
    """Pair 0 turns by 1 a position, pair 1 by 0.01. In 640 positions that is 101.9 turns and 1.019."""
    base = torch.tensor([1.0, 0.01])
    plain, one = frequencies(4, 10000.0, None)
    torch.testing.assert_close(plain, base)
    llama = Llama3Scaling(kind="llama3", factor=8, low_freq_factor=1, high_freq_factor=4, original_context=640)
    kept = (640 * 0.01 / (2 * torch.pi) - 1) / 3  # of pair 1: between one turn (slowed in full) and four (kept)
    got, factor = frequencies(4, 10000.0, llama)
    torch.testing.assert_close(got, base * torch.tensor([1.0, kept + (1 - kept) / 8]))
    assert one == factor == 1.0
    yarn = YarnScaling(kind="yarn", factor=4, original_context=640, beta_fast=32, beta_slow=1, attention_factor=None)
    # Pair d makes 640 / (2 pi 100^d) turns: 32 turns at d = 0.25, one at d = 1.004, rounded outwards to 0 and 2.
    got, factor = frequencies(4, 10000.0, yarn)
    torch.testing.assert_close(got, base * torch.tensor([1.0, 0.5 + 0.5 / 4]))
    assert factor == pytest.approx(0.1 * 1.3862944 + 1)


def test_a_shape_that_can_not_be(tiny: GPTConfig) -> None:
    shape = {k: v for k, v in tiny.model_dump().items() if k not in ("vocab_size", "head")}
    with pytest.raises(ValueError, match="heads 2 must be a multiple of kv_heads 3"):
        Shape.model_validate(shape | {"kv_heads": 3})
    with pytest.raises(ValueError, match="head_width 7 must be even"):
        Shape.model_validate(shape | {"head_width": 7, "positions": "rotary"})
