"""Blocks cut by width over two ranks against the undivided model: the same logits, losses and trained weights."""

import json
from pathlib import Path

import pytest
import torch
from ranks_tensor import drawn, train
from safetensors.torch import load_file
from test_pipeline import torchrun

from components.artifact import ForjaError
from components.model.gpt import GPT, GPTConfig
from components.model.tensor_parallel import divide


def test_two_ranks_are_one(tiny: GPTConfig, modern: GPTConfig, tmp_path: Path) -> None:
    """`grouped` has more query heads than key heads, gates, and QK norms that the ranks share."""
    grouped = modern.model_copy(update={"heads": 4, "kv_heads": 2, "block": "parallel"})
    configs = {"tiny": tiny, "grouped": grouped}
    task = json.dumps({name: config.model_dump() for name, config in configs.items()})
    torchrun(Path(__file__).with_name("ranks_tensor.py"), task, str(tmp_path))
    for name, config in configs.items():
        model = drawn(config)
        logits, losses = train(model)
        for rank in (0, 1):
            got = load_file(tmp_path / f"{name}-{rank}.safetensors")
            torch.testing.assert_close(got["logits"], logits, rtol=0, atol=1e-4)
            *ours, held = got["losses"].tolist()
            assert ours == pytest.approx(losses, abs=1e-5) and losses[-1] < losses[0]
            for key, p in model.named_parameters():
                torch.testing.assert_close(got[key], p.detach(), rtol=0, atol=1e-4, msg=lambda m, k=key: f"{k}: {m}")
            matrices = sum(p.numel() for n, p in model.named_parameters() if n.startswith("blocks.") and p.dim() > 1)
            assert held < sum(p.numel() for p in model.parameters()) - 0.49 * matrices


def test_heads_that_cannot_be_cut_are_refused(modern: GPTConfig) -> None:
    class Two:
        def size(self) -> int:
            return 2

    with pytest.raises(ForjaError, match="kv_heads: 1 cannot be cut for 2 ranks"):
        divide(GPT(modern), Two())
    with pytest.raises(ForjaError, match="mlp_width: 63"):
        divide(GPT(modern.model_copy(update={"kv_heads": 2, "mlp_width": 63})), Two())
