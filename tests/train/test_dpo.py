"""DPO, IPO and KTO against hand-worked numbers, slow loops and gradients in closed form, and as a stage."""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

sys.path.append(str(Path(__file__).parent))
from small import RECIPE, TEMPLATES, folders, train

from components.artifact import ForjaError
from components.data.chat import encode, encode_prompt
from components.model.checkpoint import load
from components.model.engine import Engine
from components.model.gpt import GPT
from components.train import dpo, ppo
from components.train.loop import Skips
from components.train.reward import Pair, Single

PAIRS = [Pair([5, 6, 7, 8, 9], [5, 6, 30], 0.0, 2), Pair([11, 12, 13, 14], [11, 12, 13, 20, 21, 22], 0.0, 3)]
SINGLES = [Single([5, 6, 7, 8], True, 2), Single([9, 8, 7], False, 1), Single([9, 30], True, 1)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return folders(tmp_path_factory.mktemp("made"))


@pytest.fixture
def models(made: dict[str, Path]) -> tuple[GPT, GPT]:
    """A policy that has moved away from its reference, and the reference."""
    policy, reference = load(made["sft"], "cpu").model, load(made["sft"], "cpu").model
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=generator))
    return policy, reference


def recipe(**changes: Any) -> ppo.Config:
    return ppo.Config.model_validate(RECIPE.model_dump() | changes)


def slowly(model: GPT, ids: Sequence[int], asked: int) -> Tensor:
    """log p of an answer, one token after the other."""
    total = torch.zeros(())
    for t in range(max(1, asked), len(ids)):
        total = total + model(torch.tensor([ids[:t]]))[0, -1].log_softmax(-1)[ids[t]]
    return total


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_the_losses_by_hand() -> None:
    chosen, rejected = torch.tensor([1.2, -3.0]), torch.tensor([-0.3, -1.0])
    assert dpo.dpo_loss(chosen, rejected, 0.5).tolist() == pytest.approx([0.386871, 1.313262], abs=1e-6)
    assert dpo.ipo_loss(chosen, rejected, 0.25).tolist() == pytest.approx([0.25, 16.0])  # (1.5 - 2)^2, (-2 - 2)^2
    h, good = torch.tensor([1.2, -0.3, 0.4]), torch.tensor([True, False, False])
    found = dpo.kto_loss(h, good, 0.4, 0.5, 2.0, 3.0).tolist()
    # 2 (1 - sigmoid(0.4)), 3 (1 - sigmoid(0.35)), 3 (1 - sigmoid(0))
    assert found == pytest.approx([0.802625, 1.240143, 1.5], abs=1e-5)


def test_losses_far_out_are_finite() -> None:
    for far in (1e4, -1e4):
        h = torch.tensor([far], requires_grad=True)
        zero, good = torch.zeros(1), torch.tensor([True])
        losses = dpo.dpo_loss(h, zero, 0.1) + dpo.ipo_loss(h, zero, 0.1) + dpo.kto_loss(h, good, 0.0, 0.1, 1, 1)
        losses.sum().backward()
        assert torch.isfinite(losses).all() and h.grad is not None and torch.isfinite(h.grad).all()


def test_the_answers_tokens_alone_count(models: tuple[GPT, GPT]) -> None:
    policy, reference = models
    texts = [*dpo.texts_of(PAIRS), *dpo.texts_of(SINGLES), ([4, 5, 6], 3), ([4, 5], 0)]
    want = [float((slowly(policy, *text) - slowly(reference, *text)).detach()) for text in texts]
    assert dpo.log_ratios(policy, reference, texts, 0).tolist() == pytest.approx(want, abs=2e-5)
    assert dpo.ratios(policy, reference, texts, 0).tolist() == pytest.approx(want, abs=2e-5)
    assert want[-2] == 0 and abs(want[0]) > 1e-3


@pytest.mark.parametrize("algorithm", dpo.KINDS)
def test_a_batch_against_a_loop(algorithm: str, models: tuple[GPT, GPT]) -> None:
    policy, reference = models
    cfg = recipe(algorithm=algorithm, beta=0.3, desirable=1.5, undesirable=0.5)
    items = dpo.singles(PAIRS) + SINGLES if algorithm == "kto" else PAIRS
    losses, sums = dpo.compared(cfg, dpo.log_ratios(policy, reference, dpo.texts_of(items), 0), items, 0.2)
    h = lambda ids, asked: float((slowly(policy, ids, asked) - slowly(reference, ids, asked)).detach())  # noqa: E731
    want, right, good, bad = [], 0, [], []
    for item in items:
        if isinstance(item, Pair):
            a, b = h(item.chosen, item.asked), h(item.rejected, item.asked)
            want.append(-math.log(sigmoid(0.3 * (a - b))) if algorithm == "dpo" else (a - b - 1 / 0.6) ** 2)
            right += a > b
            good.append(a)
            bad.append(b)
        else:
            a = h(item.ids, item.asked)
            want.append(1.5 * (1 - sigmoid(0.3 * (a - 0.2))) if item.good else 0.5 * (1 - sigmoid(0.3 * (0.2 - a))))
            right += (a > 0.2) == item.good
            (good if item.good else bad).append(a)
    assert losses.tolist() == pytest.approx(want, abs=1e-4)
    told = dpo.told(
        cfg, {name: float(value) for name, value in (sums | {"loss": losses.detach().sum()}).items()}, len(items)
    )
    drifts = sum(good) / len(good), sum(bad) / len(bad)
    assert told["loss"] == pytest.approx(sum(want) / len(want), abs=1e-4)
    assert told["accuracy"] == right / len(items) and told["margin"] == pytest.approx(
        0.3 * (drifts[0] - drifts[1]), abs=1e-4
    )
    assert (told["chosen_drift"], told["rejected_drift"]) == pytest.approx(drifts, abs=1e-4)


@pytest.mark.parametrize(("algorithm", "scale"), [("dpo", -0.1 / 2), ("ipo", -1 / 0.1), ("kto", -0.1 / 4)])
def test_the_first_gradient_in_closed_form(algorithm: str, scale: float, made: dict[str, Path]) -> None:
    """Where policy and reference are one: dpo -beta/2, ipo -1/beta, kto -beta/4 times the difference of the gradients
    of the log-probabilities of the chosen and the rejected answers."""
    policy, reference = load(made["sft"], "cpu").model, load(made["sft"], "cpu").model
    items = dpo.singles(PAIRS) if algorithm == "kto" else PAIRS
    h = dpo.log_ratios(policy, reference, dpo.texts_of(items), 0)
    assert h.tolist() == pytest.approx([0] * len(h), abs=1e-5)
    dpo.compared(recipe(algorithm=algorithm), h, items, 0.0)[0].sum().backward()
    difference = sum(slowly(reference, p.chosen, p.asked) - slowly(reference, p.rejected, p.asked) for p in PAIRS)
    (scale * difference).backward()
    for ours, theirs in zip(policy.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=2e-4 * abs(scale), rtol=2e-3)


def test_prompts_get_the_next_other_prompts_answer() -> None:
    a, b, c = [1, 2], [3], [4, 5, 6]
    items = [Single(p + x, True, len(p)) for p, x in ((a, [10]), (a, [11]), (b, [12, 13]), (c, [14]))]
    assert dpo.mismatched(items, 64) == [([1, 2, 12, 13], 2), ([1, 2, 12, 13], 2), ([3, 14], 1), ([4, 5, 6, 10], 3)]
    assert dpo.mismatched(items, 3)[1:] == [([2, 12, 13], 1), ([3, 14], 1), ([5, 6, 10], 2)]
    assert dpo.mismatched(items[:2], 64) == [] and dpo.mismatched(items[:1], 64) == []


@pytest.mark.parametrize("micro", [1, 4])
def test_the_baseline_is_a_mean_over_the_batch_and_never_negative(micro: int, models: tuple[GPT, GPT]) -> None:
    """z0 by a loop, from either side: where one mean is under 0, the other is over it by as much."""
    items = dpo.singles(PAIRS) + SINGLES
    texts = dpo.mismatched(items, 64)
    means, found = [], []
    for policy, reference in (models, models[::-1]):
        each = [float((slowly(policy, *text) - slowly(reference, *text)).detach()) for text in texts]
        means.append(sum(each) / len(each))
        engine = cast(Engine, SimpleNamespace(model=policy, micro=micro))
        nothing = dpo.Preferences([], [], [], {})
        by = dpo.Learner(engine, reference, nothing, 0, Skips(), lambda row: False)
        found.append(dpo.baseline(recipe(algorithm="kto"), by, items))
        assert dpo.baseline(recipe(algorithm="kto"), by, items[:2]) == 0.0  # one prompt, two answers
    assert found == pytest.approx([max(0.0, mean) for mean in means], abs=1e-5)
    assert abs(means[0]) > 1e-3 and min(found) == 0.0


def rows(*kinds: tuple[str | None, str | None], split: str = "train", ask: str = "say {i}", at: int = 0) -> list[dict]:
    """Rows of (chosen, rejected), each with its own question."""
    out = []
    for i, (chosen, rejected) in enumerate(kinds, at):
        row: dict[str, Any] = {"id": str(i), "lang": "en", "split": split}
        row["messages"] = [{"role": "user", "content": ask.format(i=i)}]
        said = {"chosen": chosen, "rejected": rejected}
        out.append(row | {k: {"role": "assistant", "content": v} for k, v in said.items() if v is not None})
    return out


def given(made: dict[str, Path], root: Path, table: list[dict]) -> dict[str, Path]:
    """The same folders with these preferences."""
    folder = root / "validate"
    folder.mkdir()
    for name in ("prompts", "corpus", "instructions"):
        (folder / f"{name}.jsonl").write_bytes((made["validate"] / f"{name}.jsonl").read_bytes())
    (folder / "preferences.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table), encoding="utf-8")
    return made | {"validate": folder}


PLENTY = rows(*[(f"count {i}", f"no {i}") for i in range(20)]) + rows(
    *[(f"count {i}", f"no {i}") for i in range(6)], split="val", at=20
)


def test_of_a_dialogue_the_last_answer_counts(made: dict[str, Path], tmp_path: Path) -> None:
    says = lambda role, text: {"role": role, "content": text}  # noqa: E731
    messages = [says("user", "one"), says("assistant", "two"), says("user", "three")]
    row = rows(("four", "five"))[0] | {"messages": messages}
    folder = given(made, tmp_path, [row, row | {"split": "val"}])["validate"]
    tokenizer = load(made["sft"], "cpu").tokenizer
    found = dpo.preferences(recipe(algorithm="dpo"), folder / "preferences.jsonl", tokenizer, TEMPLATES, 64)
    assert found is not None
    (item,) = found.train
    assert isinstance(item, Pair) and item.asked == len(encode_prompt(tokenizer, messages, TEMPLATES["en"]))
    assert item.chosen == encode(tokenizer, [*messages, says("assistant", "four")], TEMPLATES["en"])[0]


@pytest.mark.parametrize("algorithm", dpo.KINDS)
def test_the_stage_learns_what_was_preferred(algorithm: str, made: dict[str, Path], tmp_path: Path) -> None:
    seen: list[dict[str, float]] = []
    beta = 0.05 if algorithm == "ipo" else 0.3
    settings = {"algorithm": algorithm, "steps": 12, "eval_every": 4, "lr": 3e-4, "beta": beta}
    metrics, out = train(given(made, tmp_path, PLENTY), tmp_path, lambda row, _: seen.append(dict(row)), **settings)
    first = {"dpo": math.log(2), "ipo": 100.0, "kto": 0.5}[algorithm]
    assert seen[0]["loss"] == pytest.approx(first, abs=1e-4) and metrics["val_loss"] < 0.7 * first
    assert metrics["val_accuracy"] > 0.6 and metrics["val_margin"] > 0
    assert metrics["val_chosen_drift"] > metrics["val_rejected_drift"] and metrics["val_kl"] != 0
    assert [i + 1 for i, row in enumerate(seen) if "kl" in row] == [5, 9]
    assert metrics["rows"] == (40 if algorithm == "kto" else 20)
    evaluated = [json.loads(line) for line in (out / "evaluations.jsonl").read_text().splitlines()]
    assert [answer["step"] for answer in evaluated[0]["answers"]] == [0, 4, 8, 12]
    assert all(torch.isfinite(w).all() for w in load_file(out / "model.safetensors").values())


def test_with_adapters_the_reference_is_the_policy_without_them(made: dict[str, Path], tmp_path: Path) -> None:
    seen: list[dict[str, float]] = []
    settings = {"algorithm": "dpo", "lora": {"rank": 2, "alpha": 4}, "steps": 8, "lr": 1e-2}
    metrics, out = train(given(made, tmp_path, PLENTY), tmp_path, lambda row, _: seen.append(dict(row)), **settings)
    assert seen[0]["loss"] == pytest.approx(math.log(2), abs=1e-5) and metrics["val_loss"] < 0.6
    before, after = (load_file(folder / "model.safetensors") for folder in (made["sft"], out))
    moved = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    assert moved and all(name.startswith("blocks.") for name in moved)


def test_held_out_numbers_are_those_of_the_policy_that_goes_on(made: dict[str, Path], tmp_path: Path) -> None:
    here = given(made, tmp_path, PLENTY)
    metrics, out = train(here, tmp_path, algorithm="dpo", keep="best", eval_every=1, lr=3e-3)
    policy, tokenizer, _ = load(out, "cpu")
    cfg = recipe(algorithm="dpo")
    pairs = dpo.preferences(cfg, here["validate"] / "preferences.jsonl", tokenizer, TEMPLATES, 64)
    assert pairs is not None and len(pairs.heldout) == 6
    reference = load(made["sft"], "cpu").model
    leads = []
    for item in pairs.heldout:
        assert isinstance(item, Pair)
        h = [slowly(policy, x, item.asked) - slowly(reference, x, item.asked) for x in (item.chosen, item.rejected)]
        leads.append(float((h[0] - h[1]).detach()))
    assert metrics["val_margin"] == pytest.approx(0.1 * sum(leads) / 6, abs=1e-4)
    assert metrics["val_loss"] == pytest.approx(sum(-math.log(sigmoid(0.1 * x)) for x in leads) / 6, abs=1e-4)


@pytest.mark.parametrize("algorithm", ["dpo", "kto"])
def test_micro_batches_change_nothing(
    algorithm: str, made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = given(made, tmp_path, PLENTY)
    found = []
    for micro in ("8", "1"):
        monkeypatch.setenv("FORJA_MICRO_BATCH", micro)
        metrics, out = train(here, tmp_path / micro, algorithm=algorithm)
        found.append((metrics, load_file(out / "model.safetensors")))
    for name, weight in found[1][1].items():
        torch.testing.assert_close(weight, found[0][1][name], atol=2e-5, rtol=0)
    assert found[1][0]["loss"] == pytest.approx(found[0][0]["loss"], abs=1e-5)


class Killed(BaseException):
    """What a test throws in place of SIGKILL: nothing in the code under test catches it."""


@pytest.mark.parametrize("algorithm", ["ipo", "kto"])
def test_killed_inside_a_step_it_ends_in_the_same_bytes(
    algorithm: str, made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = given(made, tmp_path, PLENTY)
    settings = {"algorithm": algorithm, "keep": "best", "eval_every": 1, "lr": 3e-3, "steps": 5, "precision": "bf16"}
    metrics, whole = train(here, tmp_path / "whole", **settings)
    own, calls, steps = dpo.compared, [0], []

    def dying(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == 8:  # one before training, then one to learn and one to measure a step
            raise Killed
        return own(*arguments)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(dpo, "compared", dying)
        train(here, tmp_path, lambda _, step: steps.append(step), **settings)
    assert steps == [1, 2, 3]
    (tmp_path / "out").rmdir()
    again, out = train(here, tmp_path, lambda _, step: steps.append(step), **settings)
    assert steps[3:] == [3, 4, 5] and again == metrics
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {p.name: p.read_bytes() for p in whole.iterdir()}


def test_training_ends_over_the_budget(made: dict[str, Path], tmp_path: Path) -> None:
    seen: list[dict[str, float]] = []
    settings = {"algorithm": "dpo", "keep": "best", "kl_budget": 0.05, "steps": 30, "eval_every": 2, "lr": 1e-2}
    _, out = train(given(made, tmp_path, PLENTY), tmp_path, lambda row, _: seen.append(dict(row)), **settings)
    assert len(seen) < 30 and seen[-1]["kl"] > 0.05 and "loss" not in seen[-1]
    assert json.loads((out / "alarms.json").read_text())[-1]["alarm"] == "budget"


ONE = rows(("a b", "c"))
VAL = rows(("a", "b"), split="val", at=50)


@pytest.mark.parametrize(
    ("algorithm", "table", "why"),
    [
        ("dpo", [], "0 training and 0 held-out rows; ppo.algorithm dpo needs 1 and 1"),
        ("dpo", ONE, "1 training and 0 held-out rows"),
        ("ipo", rows(("same", "same"), ("x", "x")) + VAL, "0 training and 1 held-out rows.*2 left out: equal"),
        ("dpo", rows(("a", None), (None, "b")) + VAL, "0 training and 1 held-out rows.*2 left out: single"),
        (
            "kto",
            rows(("a", None), ("b", None)) + VAL,
            "every judged answer is good; ppo.algorithm kto needs good and bad",
        ),
        ("dpo", rows(("word " * 90, "b")) + VAL, "1 left out: long"),
    ],
)
def test_what_cannot_be_learnt_from_is_said(
    algorithm: str, table: list[dict], why: str, made: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(ForjaError, match=why):
        train(given(made, tmp_path, table), tmp_path, algorithm=algorithm)


@pytest.mark.parametrize("algorithm", dpo.KINDS)
@pytest.mark.parametrize(
    ("table", "left_out"),
    [
        (ONE + VAL, {}),
        (rows(("", "b"), ("a", ""), ("x", "x")) + VAL, {"equal": 1}),
        (rows(*[("a", "b")] * 3, ask="long " * 60) + rows(("word " * 90, "b"), at=9) + VAL, {"long": 1}),
        (rows(("a", "b"), (None, "c"), ("d", None)) + VAL, {"single": 2}),
    ],
    ids=["one pair", "empty answers", "long rows", "pairs and labels"],
)
def test_what_can_be_learnt_from_is_learnt(
    algorithm: str, table: list[dict], left_out: dict[str, int], made: dict[str, Path], tmp_path: Path
) -> None:
    metrics, out = train(given(made, tmp_path, table), tmp_path, algorithm=algorithm, lr=1e-2)
    assert all(torch.isfinite(w).all() for w in load_file(out / "model.safetensors").values())
    assert all(math.isfinite(value) for value in metrics.values()) and metrics["skipped"] == 0
    if algorithm == "kto":
        left_out = {why: n for why, n in left_out.items() if why != "single"}
    said = "dropped.preferences."
    assert {k.removeprefix(said): n for k, n in metrics.items() if k.startswith(said)} == left_out
