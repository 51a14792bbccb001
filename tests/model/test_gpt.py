"""The forward pass against transformers' GPT-2, and each option against its definition."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from components.model.gpt import GPT, GPTConfig, KVCache, parameter_count
from components.model.rotary import rotate, tables


def test_the_preset_is_gpt2(tiny: GPTConfig) -> None:
    theirs = GPT2LMHeadModel(
        GPT2Config(vocab_size=40, n_positions=32, n_embd=16, n_layer=2, n_head=2, attn_implementation="eager")
    ).eval()
    ours = GPT(tiny).eval()
    state = theirs.state_dict()
    names = {"ln_1": "norm1", "ln_2": "norm2", "attn.c_attn": "attention.qkv", "attn.c_proj": "attention.out"}
    names |= {"mlp.c_fc": "mlp.up", "mlp.c_proj": "mlp.down"}
    mapped = {"wte.weight": state["transformer.wte.weight"], "wpe.weight": state["transformer.wpe.weight"]}
    mapped |= {f"norm.{p}": state[f"transformer.ln_f.{p}"] for p in ("weight", "bias")}
    for layer in range(2):
        for a, b in names.items():
            for p in ("weight", "bias"):
                tensor = state[f"transformer.h.{layer}.{a}.{p}"]
                transposed = p == "weight" and "ln" not in a  # their Conv1D keeps [in, out]
                mapped[f"blocks.{layer}.{b}.{p}"] = tensor.T if transposed else tensor
    missing, unexpected = ours.load_state_dict(mapped, strict=False)
    assert missing == ["head.weight"] and not unexpected
    ids = torch.randint(0, 40, (3, 20))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-5, rtol=1e-5)
    assert parameter_count(ours) == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize("which", ["tiny", "modern"])
def test_a_cache_changes_nothing(which: str, request: pytest.FixtureRequest) -> None:
    config: GPTConfig = request.getfixturevalue(which)
    model = GPT(config).eval()
    if model.smear is not None:
        torch.nn.init.normal_(model.smear)  # it starts at zero, which would hide it
    ids = torch.randint(0, 40, (2, 12))
    cache = KVCache(config, 2, 12, model.wte.weight)
    with torch.no_grad():
        whole = model(ids)
        parts = [model(ids[:, :5], cache=cache)] + [model(ids[:, t : t + 1], cache=cache) for t in range(5, 12)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("which", ["tiny", "modern"])
def test_no_token_sees_what_follows(which: str, request: pytest.FixtureRequest) -> None:
    model = GPT(request.getfixturevalue(which)).eval()
    ids = torch.randint(0, 40, (1, 10))
    other = ids.clone()
    other[0, 6:] = (other[0, 6:] + 1) % 40
    a, b = model(ids), model(other)
    torch.testing.assert_close(a[:, :6], b[:, :6])
    assert not torch.allclose(a[:, 6:], b[:, 6:])


def test_rotary_depends_on_distance_alone() -> None:
    """The product of a rotated query and key is a function of their distance (Su et al. 2021, eq. 11)."""
    q, k = torch.randn(2, 1, 1, 1, 8)
    angles = tables(20, 8, 10000.0, None, torch.device("cpu"))
    at = lambda x, p: rotate(x, angles[:, p : p + 1])  # noqa: E731
    near = (at(q, 3) * at(k, 1)).sum()
    torch.testing.assert_close((at(q, 13) * at(k, 11)).sum(), near)
    assert not torch.isclose((at(q, 13) * at(k, 5)).sum(), near)


def test_grouped_heads_share_keys(modern: GPTConfig) -> None:
    model = GPT(modern)
    assert model.blocks[0].attention.qkv.weight.shape == (16 + 2 * 8, 16)  # two queries, one key, one value
    assert model.head.weight is not model.wte.weight


def test_too_long_is_said(tiny: GPTConfig) -> None:
    with pytest.raises(ValueError, match="33 tokens do not fit the context of 32"):
        GPT(tiny)(torch.zeros(1, 33, dtype=torch.long))


def test_scalar_head_gives_a_value_a_token(tiny: GPTConfig) -> None:
    assert GPT(tiny.model_copy(update={"head": "scalar"}))(torch.zeros(2, 5, dtype=torch.long)).shape == (2, 5)
