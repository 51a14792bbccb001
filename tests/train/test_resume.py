"""The trainings on a tiny table: killed at a step and started again, each ends in the undisturbed run's bytes."""

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml

from components.artifact import ForjaError, sha256
from components.data import tokenize
from components.log import Metrics, silent
from components.model.checkpoint import load, save
from components.train import ppo, pretrain, referee, reward, sft

SHAPE = yaml.safe_load(Path("conf/models/demo.yaml").read_text()) | {
    "context": 64,
    "layers": 1,
    "width": 16,
    "heads": 2,
    "kv_heads": 1,
    "head_width": 8,
    "mlp_width": 32,
}
OPTIM = {"lr": 1e-3, "matrix_lr": 0.02, "lr_floor": 0.1, "warmup": 1, "decay": 0.5, "weight_decay": 0.1, "beta2": 0.95}
OPTIM |= {"schedule": "wsd", "ema": None}
TRAINING = OPTIM | {"clip": 1.0, "precision": "bf16", "seed": 3, "steps": 7, "batch": 4, "eval_every": 3}
TRAINING |= {"save_every": 2}
PROMPTS = {"en": {"user": "Q: {content}\n", "assistant": "A:"}}
RLHF = {
    "epochs": 2,
    "minibatches": 2,
    "max_new_tokens": 8,
    "temperature": 1.0,
    "sampler": "forja",
    "value_lr": 1e-3,
    "value_first": 1,
    "gamma": 1.0,
}
RLHF |= {"lam": 0.95, "clip_ratio": 0.2, "clip_value": 0.2, "kl_coef": 0.1, "kl_target": 1.0, "unfinished": -1.0}
RLHF |= {"algorithm": "ppo", "judge": "model", "lora": None, "group": 1}
RLHF |= {"kl_estimator": "k1", "kl_budget": 50.0, "keep": "best"}
RLHF |= {"beta": 0.1, "desirable": 1.0, "undesirable": 1.0, "long": "cut", "val_pairs": 4}
SFT = {"long": "cut", "keep": "best"}
CONFIGS = {
    pretrain: pretrain.Config(
        **TRAINING, z_loss=0.0, model=SHAPE, init=None, context=None, packing="stream", val_windows=2, samples=["Doc"]
    ),
    sft: sft.Config(
        **TRAINING | SFT,
        z_loss=1e-4,
        prompts=PROMPTS,
        packing="bestfit",
        replay=1,
        lora=None,
        val_rows=4,
        sample_rows=2,
    ),
    reward: reward.Config(**TRAINING | SFT, share=0.6, margin=0.0, val_rows=4),
    referee: referee.Config(**TRAINING | SFT, share=0.4, margin=0.0, val_rows=4),
    ppo: ppo.Config(**TRAINING | {"matrix_lr": None}, **RLHF, val_rows=4, sample_rows=2),
}


def name_of(stage: ModuleType) -> str:
    return stage.__name__.rsplit(".", 1)[1]


def write_tables(folder: Path) -> None:
    says = lambda text: {"role": "assistant", "content": text}  # noqa: E731
    tables: dict[str, list[dict]] = {"corpus": [], "instructions": [], "preferences": [], "prompts": []}
    for i in range(24):
        common = {"id": str(i), "object": str(i), "lang": "en", "split": ("train", "train", "val", "test")[i % 4]}
        asks = [{"role": "user", "content": f"{i} + {i}?"}]
        tables["corpus"].append(common | {"text": f"Doc {i}. " + "some words to learn " * 8})
        tables["instructions"].append(common | {"messages": [*asks, says(f"{2 * i}.")]})
        tables["preferences"].append(common | {"messages": asks, "chosen": says(f"{2 * i}."), "rejected": says("no")})
        tables["prompts"].append(common | {"messages": asks})
    for name, table in tables.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table), encoding="utf-8")


def run(stage: ModuleType, root: Path, out: Path, log: Callable[[Metrics, int], None] = silent) -> dict[str, float]:
    folders = {
        n: root / n
        for n, p in inspect.signature(stage.run).parameters.items()
        if n not in ("cfg", "out", "scratch", "log") and p.default is p.empty
    }
    out.mkdir(parents=True, exist_ok=True)
    scratch = root / f"scratch-{name_of(stage)}"
    scratch.mkdir(exist_ok=True)
    metrics: dict[str, float] = stage.run(CONFIGS[stage], **folders, out=out, scratch=scratch, log=log)
    for folder in scratch.iterdir():  # as the runner does when a stage has ended well
        for path in sorted(folder.rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        folder.rmdir()
    return metrics


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, float]]]:
    """The undisturbed chain, and each stage's metrics."""
    root = tmp_path_factory.mktemp("chain")
    for name in ("validate", "tokenize"):
        (root / name).mkdir()
    write_tables(root / "validate")
    tokenize.run(
        tokenize.Config(vocab_size=300, min_frequency=1, sample_mb=9, tokenizer=None),
        root / "validate",
        root / "tokenize",
        silent,
    )
    return root, {name_of(stage): run(stage, root, root / name_of(stage)) for stage in CONFIGS}


class Killed(BaseException):
    """What a test throws in place of SIGKILL: nothing in the code under test catches it."""


@pytest.mark.parametrize("step", [1, 4, 6])
@pytest.mark.parametrize("stage", CONFIGS, ids=name_of)
def test_a_killed_stage_ends_in_the_same_bytes(stage: ModuleType, step: int, chain: tuple, tmp_path: Path) -> None:
    root, metrics = chain
    taken: list[int] = []

    def kill(_: Metrics, at: int) -> None:
        if at == step:
            raise Killed

    with pytest.raises(Killed):
        run(stage, root, tmp_path / "cut", kill)
    again = run(stage, root, tmp_path / "out", lambda _, at: taken.append(at))
    assert taken[0] == (step - 1) // 2 * 2 + 1  # on from the last checkpoint, every second step
    assert again == metrics[name_of(stage)]
    whole = root / name_of(stage)
    assert {p.name: sha256(p) for p in sorted(whole.iterdir())} == {
        p.name: sha256(p) for p in sorted((tmp_path / "out").iterdir())
    }


def test_each_stage_learns_something_else(chain: tuple) -> None:
    root, metrics = chain
    policy, answer = load(root / "ppo").model, load(root / "sft").model
    assert not torch.equal(policy.wte.weight, answer.wte.weight)
    assert metrics["sft"]["val_loss"] < metrics["sft"]["val_loss_before"]
    assert load(root / "reward").model.config.head == "scalar"
    values = reward.score(load(root / "reward").model, [[5, 6], [7, 8, 9]], 0)
    assert torch.isfinite(values).all()


def test_zero_steps_keep_the_weights(chain: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, _ = chain
    monkeypatch.setitem(CONFIGS, sft, CONFIGS[sft].model_copy(update={"steps": 0}))
    run(sft, root, tmp_path)
    assert sha256(tmp_path / "model.safetensors") == sha256(root / "pretrain" / "model.safetensors")


def test_a_reward_that_is_nan_is_refused(chain: tuple, tmp_path: Path) -> None:
    root, _ = chain
    for name in ("validate", "sft"):
        (tmp_path / name).symlink_to(root / name)
    model, *_ = load(root / "reward")
    save(model, tmp_path / "reward", root / "reward" / "tokenizer.json", PROMPTS)
    with torch.no_grad():
        model.head.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"head\.bias holds NaN"):
        save(model, tmp_path / "reward", root / "reward" / "tokenizer.json", PROMPTS)


def test_prompts_that_do_not_fit_are_said(chain: tuple, tmp_path: Path) -> None:
    root, _ = chain
    for name in ("sft", "reward"):
        (tmp_path / name).symlink_to(root / name)
    (tmp_path / "validate").mkdir()
    row = {"id": "1", "lang": "en", "split": "train", "messages": [{"role": "user", "content": "long " * 60}]}
    (tmp_path / "validate" / "prompts.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(ForjaError, match="0 training and 0 held-out prompts fit"):
        run(ppo, tmp_path, tmp_path / "out")
