"""DeepSpeed against a plain loop, and a killed run against one that was left alone."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from components.artifact import ForjaError
from components.model import engine
from components.model.engine import Engine, Optim
from components.model.gpt import GPT, GPTConfig

OPTIM = Optim(
    lr=1e-2,
    matrix_lr=None,
    lr_floor=0.1,
    warmup=2,
    decay=0.5,
    weight_decay=0.1,
    beta2=0.95,
    clip=0.5,
    precision="fp32",
)


def loss_of(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")


def batch(step: int) -> torch.Tensor:
    return torch.randint(0, 40, (8, 17), generator=torch.Generator().manual_seed(step)).to(engine.device())


def steps(trained: Engine, first: int, last: int) -> list[float]:
    losses = []
    for step in range(first, last):
        trained.set_rate(engine.schedule(OPTIM, step, 10))
        total = 0.0
        for micro in batch(step).split(trained.micro):
            loss = loss_of(trained.ds, micro)
            trained.step(loss, 8 * 16)
            total += float(loss.detach())
        losses.append(total / 128)
    return losses


def plain(config: GPTConfig, n: int) -> tuple[list[float], list[float]]:
    """The same training without DeepSpeed: losses and gradient norms."""
    torch.manual_seed(0)
    model = GPT(config).to(engine.device())
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-8)
    losses, norms = [], []
    for step in range(n):
        for group in adamw.param_groups:
            group["lr"] = 1e-2 * engine.schedule(OPTIM, step, 10)
        loss = loss_of(model, batch(step)) / 128
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        adamw.step()
        adamw.zero_grad()
        losses.append(float(loss.detach()))
    return losses, norms


@pytest.mark.parametrize("zero", ["0", "1"])
@pytest.mark.parametrize("micro", ["8", "2"])
def test_deepspeed_is_a_plain_loop(zero: str, micro: str, tiny: GPTConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORJA_ZERO", zero)
    monkeypatch.setenv("FORJA_MICRO_BATCH", micro)
    want, norms = plain(tiny, 6)
    torch.manual_seed(0)
    trained = Engine(GPT(tiny), OPTIM, 8)
    assert steps(trained, 0, 6) == pytest.approx(want, abs=1e-5)
    if zero == "0":
        assert trained.grad_norm == pytest.approx(norms[-1], rel=1e-3)


@pytest.mark.parametrize("change", [{}, {"precision": "bf16"}, {"matrix_lr": 0.02}])
def test_resumed_is_undisturbed(change: dict, tiny: GPTConfig, tmp_path: Path) -> None:
    optim = OPTIM.model_copy(update=change)
    torch.manual_seed(0)
    whole = Engine(GPT(tiny), optim, 8)
    steps(whole, 0, 3)
    engine.save(tmp_path, 3, {"model": whole}, {"kl_coef": 0.1})
    losses = steps(whole, 3, 6)

    torch.manual_seed(1)
    again = Engine(GPT(tiny), optim, 8)
    assert engine.resume(tmp_path, {"model": again}) == {"step": 3, "kl_coef": 0.1}
    assert steps(again, 3, 6) == losses
    for name, p in whole.ds.module.state_dict().items():
        assert torch.equal(p, again.ds.module.state_dict()[name]), name


def test_the_newest_whole_checkpoint_is_used(tiny: GPTConfig, tmp_path: Path) -> None:
    trained = Engine(GPT(tiny), OPTIM, 8)
    for step in (1, 2, 3):
        engine.save(tmp_path, step, {"model": trained}, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]  # two are kept
    weights = next((tmp_path / "step-00000003").rglob("*.pt"))
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    state = engine.resume(tmp_path, {"model": trained})
    assert state is not None and state["step"] == 2
    (tmp_path / "step-00000002" / "record.json").unlink()
    assert engine.resume(tmp_path, {"model": trained}) is None


def test_schedule_by_hand() -> None:
    """Two steps up, the full rate, and from step 5 of 10 down to a tenth: 1 -> 0.1 + 0.9 * left / 5."""
    assert [engine.schedule(OPTIM, s, 10) for s in (0, 1, 4, 5, 7, 10)] == pytest.approx([0.5, 1, 1, 1, 0.64, 0.1])
    assert engine.schedule(OPTIM.model_copy(update={"decay": 0.0, "warmup": 0}), 9, 10) == 1.0


def test_a_micro_batch_that_does_not_divide_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORJA_MICRO_BATCH", "3")
    with pytest.raises(ForjaError, match="does not divide the batch of 8"):
        engine.micro_batch(8)
