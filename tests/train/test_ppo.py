"""PPO on models of random weights: what its steps promise, one against another way of computing it, and bad inputs."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small import GRPO, RECIPE, folders, prompts, train

from components.artifact import ForjaError
from components.data.chat import SEPARATOR, special
from components.data.templates import stop
from components.model import generate
from components.model.checkpoint import load
from components.model.gpt import GPT
from components.train import ppo, rollout
from components.train import questions as held
from components.train.questions import by_model, evaluated, questions

HERE = Path(__file__).parent
ALGORITHMS = ["ppo", "grpo"]
LORA = {"rank": 2, "alpha": 4.0}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return folders(tmp_path_factory.mktemp("made"))


@pytest.fixture
def told(made: dict[str, Path], tmp_path: Path) -> tuple[list[dict[str, float]], dict[str, float], Path]:
    """The rows, metrics and folder of RECIPE's own run."""
    rows: list[dict[str, float]] = []
    metrics, out = train(made, tmp_path / "told", lambda row, step: rows.append({**row, "step": step}))
    return rows, metrics, out


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def finite(folder: Path) -> bool:
    return all(bool(torch.isfinite(w).all()) for w in weights(folder).values())


def close(a: Sequence[dict[str, float]], b: Sequence[dict[str, float]]) -> None:
    """Rows that say the same but for rounding and time."""
    kept = [[{k: v for k, v in row.items() if k != "step" and "perf/" not in k} for row in rows] for rows in (a, b)]
    assert len(a) == len(b)
    for mine, theirs in zip(*kept, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-4, rel=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"precision": "bf16"},
        {"precision": "bf16", "micro": 2},
        {"temperature": 0.7, "micro": 4},
        {"micro": 1},
        {"micro": 2, "batch": 16},
        GRPO,
        GRPO | {"precision": "bf16", "micro": 2},
        {"lora": LORA},
        GRPO | {"lora": LORA, "temperature": 0.7},
    ],
    ids=str,
)
def test_the_first_look_at_a_rollout_changes_nothing(
    changes: dict[str, Any], made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One pass, one minibatch, whose step comes last: ratio exactly 1, approximate KL and clipped share exactly 0."""
    changes = dict(changes)
    if "micro" in changes:
        monkeypatch.setenv("FORJA_MICRO_BATCH", str(changes.pop("micro")))
    rows: list[dict[str, float]] = []
    train(made, tmp_path, lambda row, _: rows.append(dict(row)), minibatches=1, epochs=1, value_first=0, **changes)
    assert len(rows) == RECIPE.steps and rows[-1]["kl"] != 0
    assert [(row["first_off"], row["approx_kl"], row["clip_fraction"]) for row in rows] == [(0.0, 0.0, 0.0)] * 4


def test_what_is_kept_of_a_rollout_is_what_would_be_read_again(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One piece: the update's first pass goes on from the scoring's. The weights are those without that."""
    once = {"minibatches": 1, "value_first": 0, "steps": 2, "temperature": 0.7}
    _, kept = train(made, tmp_path / "kept", **once)
    real, seen = ppo.roll_out, []

    def forgetful(*arguments: Any, **keywords: Any) -> tuple[rollout.Rollout, dict[str, float]]:
        r, row = real(*arguments, **keywords)
        seen.append(r.kept is not None and r.kept.values is not None and r.kept.logprobs.requires_grad)
        return r._replace(kept=None), row

    monkeypatch.setattr(ppo, "roll_out", forgetful)
    _, again = train(made, tmp_path / "again", **once)
    assert seen == [True, True]
    first, second = (load_file(folder / "model.safetensors") for folder in (kept, again))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_later_looks_are_not_like_the_first(told: tuple) -> None:
    rows, *_ = told
    assert all(row["first_off"] == 0 for row in rows)
    # At first the policy stands still, and only rows in another order round otherwise.
    assert [abs(row["approx_kl"]) > 1e-5 for row in rows] == [False, True, True, True]


def test_sampler_and_trainer_agree_on_log_probabilities(made: dict[str, Path]) -> None:
    """Cached, a token at a time, whole batches at once: within 1e-5 in float32."""
    policy, tokenizer, templates = load(made["sft"])
    end = stop(tokenizer, templates)
    table, dropped = questions(tokenizer, made["validate"] / "prompts.jsonl", templates, 40)
    asked = sorted((row["ids"] for row in table["train"]), key=len)
    said = generate.answers(policy, asked, max_new_tokens=24, stop=end, temperature=1.0, seed=5, logprobs=True)
    assert not dropped and len({len(a.ids) for a in said}) > 2  # of several lengths, so that there is padding
    sequences = [p + a.ids for p, a in zip(asked, said, strict=True)]
    ids = torch.full((len(asked), max(map(len, sequences))), special(tokenizer, SEPARATOR))
    mask = torch.zeros(len(asked), ids.shape[1] - 1, dtype=torch.bool)
    for i, (prompt, row) in enumerate(zip(asked, sequences, strict=True)):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, len(prompt) - 1 : len(row) - 1] = True
    logprobs, reference, *_ = rollout.read(policy, policy, load(made["reward"]).model, ids, mask, RECIPE, micro=3)
    torch.testing.assert_close(logprobs[mask], torch.tensor([x for a in said for x in a.logprobs]), atol=1e-5, rtol=0)
    assert torch.equal(logprobs, reference)


def test_at_a_temperature_the_policy_is_what_is_sampled_from(made: dict[str, Path]) -> None:
    """softmax(logits / T) by hand at one position: its log-probability and its entropy."""
    policy = load(made["sft"]).model
    ids = torch.tensor([[5, 6, 7]])
    mask = torch.tensor([[False, True]])
    cfg = RECIPE.model_copy(update={"temperature": 0.5, "minibatches": 1})
    logprobs, _, _, entropy, _ = rollout.read(policy, policy, load(made["reward"]).model, ids, mask, cfg, micro=1)
    with torch.no_grad():
        weights = [math.exp(2 * float(x)) for x in policy(ids[:, :-1])[0, 1]]
    total = sum(weights)
    assert float(logprobs[0, 1]) == pytest.approx(math.log(weights[7] / total), abs=1e-5)
    assert entropy == pytest.approx(-sum(w / total * math.log(w / total) for w in weights), abs=1e-4)


@pytest.mark.parametrize("changes", [{}, GRPO | {"steps": 3}], ids=ALGORITHMS)
def test_micro_batches_change_nothing(
    changes: dict[str, Any], made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[dict[str, float]] = []
    _, out = train(made, tmp_path / "whole", lambda row, _: rows.append(dict(row)), **changes)
    monkeypatch.setenv("FORJA_MICRO_BATCH", "1")
    again: list[dict[str, float]] = []
    _, other = train(made, tmp_path / "micro", lambda row, _: again.append(dict(row)), **changes)
    close(again, rows)
    for name, weight in load_file(other / "model.safetensors").items():
        torch.testing.assert_close(weight, load_file(out / "model.safetensors")[name], atol=1e-5, rtol=0)


def test_two_ranks_are_one(told: tuple, made: dict[str, Path], tmp_path: Path) -> None:
    rows, _, out = told
    environment = {k: v for k, v in os.environ.items() if not k.startswith("FORJA_")}
    environment |= {"PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1", "FORJA_DEVICE": "cpu"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, HERE / "ranks_ppo.py", made["sft"].parent, tmp_path],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    close(json.loads((tmp_path / "rows.json").read_text()), rows)
    for name, weight in load_file(tmp_path / "rank-0" / "out" / "model.safetensors").items():
        torch.testing.assert_close(weight, load_file(out / "model.safetensors")[name], atol=1e-5, rtol=0)


class Killed(BaseException):
    """What a test throws in place of SIGKILL: nothing in the code under test catches it."""


@pytest.mark.parametrize(
    ("place", "call", "changes"),
    [
        ("generate", 3, {}),
        ("read", 3, {}),
        ("rl.policy_loss", 10, {}),
        ("rl.value_loss", 11, {}),
        ("generate", 3, GRPO),
        ("rl.policy_loss", 10, GRPO),
        ("rl.policy_loss", 11, GRPO | {"lora": LORA, "kl_target": 1.0}),
    ],
    ids=str,
)
def test_killed_inside_a_rollout_or_an_update(
    place: str,
    call: int,
    changes: dict[str, Any],
    made: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the third rollout, behind the checkpoint of the second: the same command ends in the undisturbed bytes."""
    settings = {"keep": "best", "eval_every": 1, "lr": 1e-2} | changes
    metrics, whole = train(made, tmp_path / "whole", **settings)
    where = ppo.rl if place.startswith("rl.") else rollout
    name = place.removeprefix("rl.")
    own, calls, steps = getattr(where, name), [0], []

    def dying(*arguments: Any, **keywords: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            raise Killed
        return own(*arguments, **keywords)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(where, name, dying)
        train(made, tmp_path, lambda _, step: steps.append(step), **settings)
    assert steps == [1, 2]
    (tmp_path / "out").rmdir()
    again, out = train(made, tmp_path, lambda _, step: steps.append(step), **settings)
    assert steps[-2:] == [3, 4] and again == metrics
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {p.name: p.read_bytes() for p in whole.iterdir()}


def test_the_best_held_out_step_is_what_goes_on(made: dict[str, Path], tmp_path: Path) -> None:
    """Its weights give the reward that it is said to have; no evaluation had a higher one."""
    rows: list[dict[str, float]] = []
    settings = {"keep": "best", "steps": 6, "eval_every": 1, "lr": 1e-2}
    metrics, out = train(made, tmp_path, lambda row, _: rows.append(dict(row)), **settings)
    found = [metrics["val_reward_before"], *(row["val_reward"] for row in rows)]
    assert metrics["val_reward"] == max(found) and found.index(max(found)) == metrics["best_step"]
    assert 0 < metrics["best_step"] < 6
    policy, tokenizer, templates = load(out)
    marks = special(tokenizer, SEPARATOR), stop(tokenizer, templates)
    table, _ = questions(tokenizer, made["validate"] / "prompts.jsonl", templates, 56)
    heldout = table["val"][: RECIPE.val_rows]
    scored = by_model(load(made["reward"]).model, marks[0])
    again = evaluated(policy, scored, heldout, marks[1], RECIPE.max_new_tokens, 0)
    assert again["reward"] == pytest.approx(metrics["val_reward"], abs=1e-5)


def test_evaluations_lie_side_by_side(told: tuple) -> None:
    curves, metrics, out = told
    assert [row["step"] for row in curves if "val_repetition" in row] == [2, 4]
    rows = [json.loads(line) for line in (out / "evaluations.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [[a["step"] for a in row["answers"]] for row in rows] == [[0, 2, 4]] * RECIPE.sample_rows
    assert metrics["val_reward"] != metrics["val_reward_before"]


def test_training_ends_over_the_budget(made: dict[str, Path], tmp_path: Path, caplog: Any) -> None:
    rows: list[dict[str, float]] = []
    settings = {"keep": "best", "kl_budget": 0.5, "kl_estimator": "k3", "steps": 30, "lr": 1e-2}
    metrics, out = train(made, tmp_path, lambda row, _: rows.append(dict(row)), **settings)
    assert 1 < len(rows) < 30 and metrics["rollouts"] == len(rows)
    assert all(row["kl"] <= 0.5 for row in rows[:-1]) and rows[-1]["kl"] > 0.5
    assert "val_reward" not in rows[-1] and metrics["best_step"] < len(rows)
    alarms = json.loads((out / "alarms.json").read_text())
    assert alarms[-1]["alarm"] == "budget" and alarms[-1]["step"] == len(rows)
    assert f"rollout {len(rows)}: {alarms[-1]['text']}" in caplog.text


def test_a_budget_wants_the_best_step() -> None:
    with pytest.raises(ValueError, match="set keep to best"):
        ppo.Config.model_validate(RECIPE.model_dump() | {"kl_budget": 5.0})


@pytest.mark.parametrize("changes", [{}, GRPO], ids=ALGORITHMS)
@pytest.mark.parametrize("held_out", [False, True])
def test_one_reward_that_is_nan_ends_the_training(
    held_out: bool, changes: dict[str, Any], made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the first evaluation of 4 prompts, or at the first rollout."""
    scored = held.score

    def one_nan(model: GPT, sequences: Sequence[Sequence[int]], pad: int) -> torch.Tensor:
        scores = scored(model, sequences, pad)
        if held_out or len(sequences) != 4:
            scores[3] = math.nan
        return scores

    monkeypatch.setattr(held, "score", one_nan)
    many = 4 if held_out else 16 if changes else 8
    with pytest.raises(ForjaError, match=f"reward of 1 of {many} answers is NaN"):
        train(made, tmp_path, **changes)
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("changes", [{}, GRPO], ids=ALGORITHMS)
def test_rewards_that_are_all_equal_are_said_and_harm_nothing(
    changes: dict[str, Any], made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(held, "score", lambda model, sequences, pad: torch.full((len(sequences),), -1.0))
    metrics, out = train(made, tmp_path, **changes)
    assert finite(out) and metrics["reward_deviation"] == 0
    assert {"equal", "unfinished"} & {a["alarm"] for a in json.loads((out / "alarms.json").read_text())}
    if changes:  # nothing is better than anything: no weight has moved
        assert metrics["equal_groups"] == 1 and metrics["kl"] == 0 and "loss" not in metrics
        assert weights(out).keys() == weights(made["sft"]).keys()
        assert all(torch.equal(w, weights(made["sft"])[n]) for n, w in weights(out).items())


@pytest.mark.parametrize("changes", [{}, GRPO], ids=ALGORITHMS)
def test_empty_answers_and_a_single_prompt(
    changes: dict[str, Any], made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every answer is the token that ends it, and there is one prompt to learn from and one to measure by."""
    monkeypatch.setattr(rollout, "generate", lambda model, asked, stop, **_: [[stop]] * len(asked))
    asked = [("train", "count"), ("val", "count"), ("train", "long " * 60)]
    metrics, out = train(table(made, tmp_path, asked), tmp_path, **changes)
    assert finite(out) and metrics["length"] == 1 and metrics["dropped"] == metrics["dropped.long"] == 1
    assert metrics["unfinished"] == 0 and metrics["repetition"] == 0


@pytest.mark.parametrize(("asked", "said"), [([], "0 training"), ([("train", "a")], "1 training and 0 held-out")])
def test_too_few_prompts(asked: list, said: str, made: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ForjaError, match=f"{said}.*lower it, or add prompts"):
        train(table(made, tmp_path, asked), tmp_path)


def test_answers_as_long_as_the_context_leave_no_room(made: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ForjaError, match="24 are longer than the 0 tokens"):
        train(made, tmp_path, max_new_tokens=64)


def test_settings_that_do_not_go_together() -> None:
    wrong = {
        "grpo and group 1": {"algorithm": "grpo", "kl_estimator": "k3"},
        "ppo and group 2": {"group": 2},
        "kl_estimator k1": GRPO | {"kl_estimator": "k1"},
        "2 answers at least": {"batch": 1},
        "matrix_lr null": {"lora": LORA, "matrix_lr": 0.02},
    }
    for said, changes in wrong.items():
        with pytest.raises(ValueError, match=said):
            ppo.Config.model_validate(RECIPE.model_dump() | changes)


def test_adapters_learn_beside_a_base_that_is_the_reference(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bytes as with a frozen copy of SFT beside the adapted policy, and nothing but adapters has moved."""
    rows: list[dict[str, float]] = []
    _, out = train(made, tmp_path / "shared", lambda row, _: rows.append(dict(row)), lora=LORA, lr=1e-2)
    own = ppo.roll_out

    def with_a_copy(policy: GPT, reference: GPT | None, *more: Any, **keywords: Any) -> Any:
        assert reference is None
        return own(policy, load(made["sft"]).model, *more, **keywords)

    monkeypatch.setattr(ppo, "roll_out", with_a_copy)
    _, other = train(made, tmp_path / "copied", lora=LORA, lr=1e-2)
    assert rows[-1]["kl"] != 0
    before, after = weights(made["sft"]), weights(out)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {p.name: p.read_bytes() for p in other.iterdir()}
    assert before.keys() == after.keys()  # merged
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(name.startswith("blocks.") and before[name].dim() == 2 for name in moved)
    change = next(after[name] - before[name] for name in moved)
    assert torch.linalg.matrix_rank(change, tol=1e-5) <= LORA["rank"]


def table(made: dict[str, Path], root: Path, asked: list[tuple[str, ...]]) -> dict[str, Path]:
    """The same folders with other prompts."""
    folder = root / "validate"
    folder.mkdir()
    (folder / "prompts.jsonl").write_text(prompts(asked), encoding="utf-8")
    return made | {"validate": folder}
