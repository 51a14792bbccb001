"""Answers by vLLM. What asks vLLM itself runs where FORJA_VLLM names a Python that has it."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import small
import torch

from components.artifact import ForjaError
from components.model.generate import generate
from components.model.gpt import GPT, GPTConfig
from components.model.lora import Lora, adapt
from components.train import vllm_rollout

LLAMA = {
    **{"context": 128, "layers": 2, "width": 64, "heads": 2, "kv_heads": 1, "head_width": 32, "mlp_width": 128},
    **{"block": "pre", "norm": "rms", "norm_eps": 1e-5, "positions": "rotary", "rope_theta": 1e4},
    **{"rope_scaling": None, "activation": "swiglu", "window": None, "qk_norm": False, "bias": "none", "tied": False},
    **{"logit_cap": None, "smear": False, "residual_init": "scaled", "vocab_size": 97, "head": "lm"},
}
QWEN3 = LLAMA | {"qk_norm": True, "tied": True}  # the head has to follow too
GPT2 = LLAMA | {"norm": "layer", "positions": "learned", "activation": "gelu", "bias": "all", "kv_heads": 2}
GPT2 |= {"tied": True}
OTHER = LLAMA | {"context": 100}  # of which no worker runs
asks_vllm = pytest.mark.skipif(
    not os.environ.get("FORJA_VLLM"), reason="FORJA_VLLM is not set: no Python with vLLM to ask"
)


@pytest.fixture(autouse=True, scope="module")
def one_worker_a_shape() -> Iterator[None]:
    with vllm_rollout.ended():
        yield


def model(shape: dict[str, object], seed: int = 1) -> GPT:
    torch.manual_seed(seed)
    made = GPT(GPTConfig.model_validate(shape)).eval()
    with torch.no_grad():
        for name, p in made.named_parameters():
            if p.dim() > 1 and "wte" not in name:
                p.mul_(6.0)  # far enough from uniform that rounding changes no token
    return made


def prompts() -> list[list[int]]:
    g = torch.Generator().manual_seed(0)
    return [torch.randint(0, 97, (n,), generator=g).tolist() for n in (3, 7, 12, 40, 5, 21)]


def by_vllm(policy: GPT, asked: list[list[int]], **changes: object) -> list[list[int]]:
    options = {"max_new_tokens": 24, "stop": 7, "temperature": 0.0, "seed": 5, "precision": "fp32"} | changes
    return vllm_rollout.generate(policy, asked, **options)  # type: ignore[arg-type]


@asks_vllm
@pytest.mark.parametrize("shape", [LLAMA, QWEN3, GPT2], ids=["llama", "qwen3", "gpt2"])
def test_greedy_answers_are_our_generator_s_and_follow_the_weights(shape: dict[str, object]) -> None:
    policy, other = model(shape), model(shape, seed=2)
    mine = generate(policy, prompts(), max_new_tokens=24, stop=-1)
    stop = mine[1][4]  # one that ends at least this answer
    mine = generate(policy, prompts(), max_new_tokens=24, stop=stop, temperature=0.0)
    assert {len(answer) for answer in mine} != {24}
    assert by_vllm(policy, prompts(), stop=stop) == mine

    policy.load_state_dict(other.state_dict())
    theirs = generate(other, prompts(), max_new_tokens=24, stop=stop, temperature=0.0)
    assert theirs != mine
    assert by_vllm(policy, prompts(), stop=stop) == theirs
    assert [config for config, _ in vllm_rollout._running].count(policy.config) == 1


@asks_vllm
def test_adapters_count_and_a_seed_says_the_tokens() -> None:
    policy = model(LLAMA)
    before = by_vllm(policy, prompts(), temperature=1.0)
    adapt(policy, Lora(rank=2, alpha=8.0))
    assert by_vllm(policy, prompts(), temperature=1.0) == before  # B is zero
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if name.endswith(".b"):
                p.normal_(std=0.5)
    adapted = by_vllm(policy, prompts())
    assert adapted == generate(policy, prompts(), max_new_tokens=24, stop=7, temperature=0.0)
    assert by_vllm(policy, prompts(), temperature=1.0) != before
    with vllm_rollout.ended():
        pass
    assert by_vllm(policy, prompts()) == adapted
    assert by_vllm(model(LLAMA), prompts(), temperature=1.0) == before  # by another process too
    assert by_vllm(model(LLAMA), prompts(), temperature=1.0, seed=6) != before


@asks_vllm
def test_tokens_come_as_often_as_the_policy_says() -> None:
    policy, count = model(LLAMA), 3000
    first = by_vllm(policy, [prompts()[2]] * count, max_new_tokens=1, temperature=1.7)
    seen = torch.bincount(torch.tensor(first).flatten(), minlength=97) / count
    with torch.no_grad():
        wanted = torch.softmax(policy(torch.tensor([prompts()[2]]))[0, -1] / 1.7, -1)
        untempered = torch.softmax(policy(torch.tensor([prompts()[2]]))[0, -1], -1)
    # Of the distance |p - q| / 2 over 97 tokens, 3,000 draws leave 0.07 by chance, 0.085 in the worst of 500 trials.
    assert (seen - wanted).abs().sum() / 2 < 0.11 < (seen - untempered).abs().sum() / 2


@asks_vllm
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_ppo_by_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    monkeypatch.setattr(small, "SHAPE", small.SHAPE | {"activation": "swiglu", "head_width": 32})
    made = small.folders(tmp_path / "made")
    changes = {"sampler": "vllm", "precision": precision, "steps": 2, "save_every": 5}
    rows: list[dict[str, float]] = []
    small.train(made, tmp_path / "one", log=lambda row, step: rows.append(dict(row)), **changes)
    assert len(rows) == 2
    assert all(row["first_off"] == 0 for row in rows)
    assert not vllm_rollout._running


def test_a_shape_that_vllm_cannot_load_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORJA_VLLM", sys.executable)
    with pytest.raises(ForjaError, match=r"activation relu2, wants swiglu; set ppo\.sampler=forja"):
        by_vllm(model(OTHER | {"activation": "relu2"}), prompts())


def test_without_vllm_the_error_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.delenv("FORJA_VLLM", raising=False)
    with pytest.raises(ForjaError, match="FORJA_VLLM is not set"):
        by_vllm(model(OTHER), prompts())
    monkeypatch.setenv("FORJA_VLLM", str(tmp_path / "nowhere"))
    with pytest.raises(ForjaError, match="nowhere: cannot be run"):
        by_vllm(model(OTHER), prompts())
    assert [*tmp_path.iterdir()] == []


def test_what_ends_a_worker_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setenv("FORJA_VLLM", sys.executable)  # which has no vLLM
    with pytest.raises(ForjaError, match="vLLM ended with code 1: ModuleNotFoundError: No module named 'vllm'"):
        by_vllm(model(OTHER), prompts())
    assert [*tmp_path.iterdir()] == []


def test_several_ranks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_rollout, "world", lambda: (0, 2))
    with pytest.raises(ForjaError, match="one rank"):
        by_vllm(model(OTHER), prompts())
