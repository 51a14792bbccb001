"""Every preset builds, and is as large as its makers say."""

from pathlib import Path

import pytest
import torch
import yaml

from components.model.gpt import GPT, GPTConfig, Shape, parameter_count
from pipelines.recipe import named

MODELS = Path(__file__).parents[2] / "conf" / "models"
PRESETS = sorted(p.stem for p in MODELS.glob("*.yaml"))


def shape_of(name: str) -> Shape:
    return Shape.model_validate(named(MODELS.parents[1], "models", name, "pretrain.model"))


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_the_published_count(name: str) -> None:
    published = yaml.safe_load((MODELS / f"{name}.yaml").read_text()).get("published")
    if published is None:
        assert name in ("gpt", "demo")  # forja's own
        published = {"vocab_size": 2048, "parameters": None}
    with torch.device("meta"):
        model = GPT(GPTConfig(**shape_of(name).model_dump(), vocab_size=published["vocab_size"], head="lm"))
    if published["parameters"] is not None:
        assert parameter_count(model) == pytest.approx(published["parameters"], rel=0.005)


def test_the_lines_that_the_field_knows_are_whole() -> None:
    line = {f"gpt3-{size}" for size in ("125m", "350m", "760m", "1.3b", "2.7b", "6.7b", "13b", "175b")}
    line |= {"gpt1-117m"} | {f"gpt2-{size}" for size in ("124m", "355m", "774m", "1.5b")}
    line |= {f"palm-{size}" for size in ("8b", "62b", "540b")} | {f"llama3-{size}" for size in ("1b", "8b", "70b")}
    line |= {f"qwen3-{size}" for size in ("0.6b", "1.7b", "4b", "8b", "14b", "32b")}
    assert line <= set(PRESETS)
