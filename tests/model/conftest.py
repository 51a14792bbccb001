import pytest
import torch

from components.model.gpt import GPTConfig


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def tiny() -> GPTConfig:
    """The preset `gpt`, small."""
    return GPTConfig(
        context=32,
        layers=2,
        width=16,
        heads=2,
        kv_heads=2,
        mlp_width=64,
        norm="layer",
        positions="learned",
        activation="gelu",
        qk_norm=False,
        bias=True,
        tied=True,
        rope_theta=10000.0,
        smear=False,
        vocab_size=40,
        head="lm",
    )


@pytest.fixture
def modern(tiny: GPTConfig) -> GPTConfig:
    """The heirs' options at once."""
    heirs = {
        "norm": "rms",
        "positions": "rotary",
        "activation": "swiglu",
        "qk_norm": True,
        "bias": False,
        "smear": True,
    }
    return tiny.model_copy(update=heirs | {"kv_heads": 1, "tied": False})
