from pathlib import Path

import pytest
import torch
import yaml

from components.model.gpt import GPTConfig

GPT_PRESET = Path(__file__).parents[2] / "conf" / "models" / "gpt.yaml"


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def tiny() -> GPTConfig:
    """The preset `gpt`, small."""
    small = {"context": 32, "layers": 2, "width": 16, "heads": 2, "kv_heads": 2, "head_width": 8, "mlp_width": 64}
    return GPTConfig(**yaml.safe_load(GPT_PRESET.read_text()) | small, vocab_size=40, head="lm")


@pytest.fixture
def modern(tiny: GPTConfig) -> GPTConfig:
    """The heirs' options at once."""
    heirs = {
        "norm": "rms",
        "positions": "rotary",
        "activation": "swiglu",
        "qk_norm": True,
        "bias": "none",
        "smear": True,
    }
    return tiny.model_copy(update=heirs | {"kv_heads": 1, "tied": False})
