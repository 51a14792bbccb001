"""The shared loop: what it divides by, and that it stops when there is nothing left to save."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from components.log import Log, Metrics, silent
from components.train.loop import Diverged, Training, fit

CFG = Training(
    lr=0.1,
    matrix_lr=None,
    schedule="wsd",
    ema=None,
    lr_floor=1.0,
    warmup=0,
    decay=0.0,
    weight_decay=0.0,
    beta2=0.95,
    clip=1e9,
    precision="fp32",
    seed=0,
    steps=2,
    batch=4,
    eval_every=2,
    save_every=10,
)


class Line(nn.Module):
    """y = w x, small enough to work out by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.w


def loss_of(model: nn.Module, items: list[tuple[float, int]]) -> tuple[Tensor, dict[str, Tensor]]:
    x = torch.tensor([[value] for value, _ in items])
    return model(x).sum(), {"rows": torch.tensor(float(len(items)))}


@pytest.mark.parametrize("micro", ["4", "1"])
def test_the_loss_is_the_sum_over_the_count_however_it_is_cut(
    micro: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values 1, 2, 3, 4 that count 1, 1, 2, 6: loss 10 / 10 = 1 at w = 1, and the gradient is 1."""
    monkeypatch.setenv("FORJA_MICRO_BATCH", micro)
    items = [(1.0, 1), (2.0, 1), (3.0, 2), (4.0, 6)]
    rows: list[tuple[int, dict[str, float]]] = []

    def log(metrics: Metrics, step: int) -> None:
        rows.append((step, dict(metrics)))

    model = Line()
    _, last = fit(
        model,  # type: ignore[arg-type]
        CFG,
        lambda step: items,
        loss_of,  # type: ignore[arg-type]
        lambda item: item[1],
        lambda model: {"loss": 7.0},
        tmp_path,
        log,
    )
    assert rows[0][1]["loss"] == pytest.approx(1.0) and rows[0][1]["grad_norm"] == pytest.approx(1.0)
    assert rows[0][1]["rows"] == pytest.approx(0.4)
    assert float(model.w.detach()) == pytest.approx(0.8, abs=1e-5)  # AdamW moves by lr where the gradient is steady
    assert [step for step, _ in rows] == [1, 2] and "val_loss" not in rows[0][1]
    assert last["val_loss"] == 7.0 and "progress" not in last and not any(k.startswith("perf/") for k in last)


def trained(tmp_path: Path, rows: list[list[tuple[float, int]]], log: Log = silent) -> tuple[float, dict[str, float]]:
    """The weight that training on these batches ends with, and the metrics."""
    tmp_path.mkdir(exist_ok=True)
    cfg = CFG.model_copy(update={"steps": len(rows)})
    model, last = fit(
        Line(),  # type: ignore[arg-type]
        cfg,
        rows.__getitem__,
        loss_of,  # type: ignore[arg-type]
        lambda item: item[1],
        lambda model: {},
        tmp_path,
        log,
    )
    return float(model.w.detach()), last  # type: ignore[attr-defined]


GOOD = [(1.0, 1), (2.0, 1), (3.0, 2), (4.0, 6)]
NAN = [(float("nan"), 1)] * 4
LARGE = [(3e38, 1)] * 4  # the loss is infinite, each gradient 3e38 / 4, and their sum finite


@pytest.mark.parametrize("zero", ["0", "1", "2"])
@pytest.mark.parametrize("bad", [NAN, LARGE], ids=["nan", "infinite loss"])
def test_a_step_that_is_not_finite_is_left_out(
    bad: list, zero: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a constant rate the rest of the run is the run without that step: moments and their count included."""
    monkeypatch.setenv("FORJA_ZERO", zero)
    rows: list[dict[str, float]] = []
    other = [(2.0, 1), (0.5, 3), (1.0, 1), (-1.0, 1)]
    got = trained(tmp_path / "a", [GOOD, bad, other, GOOD, bad], lambda row, _: rows.append(dict(row)))
    want = trained(tmp_path / "b", [GOOD, other, GOOD])
    assert got[0] == want[0]
    assert [row.get("skipped") for row in rows] == [None, 1.0, None, None, 2.0]
    assert "loss" not in rows[1] and got[1]["loss"] == want[1]["loss"]
    assert got[1]["skipped"] == 2.0 and want[1]["skipped"] == 0.0


def test_too_many_in_a_row_end_the_run(tmp_path: Path) -> None:
    with pytest.raises(Diverged, match=r"step 13: the loss is nan.* and 11 steps in a row .* lower lr"):
        trained(tmp_path, [GOOD] * 3 + [NAN] * 12)
    with pytest.raises(Diverged, match=r"step 1: .* and 2 steps in a row"):  # nothing was learnt at all
        trained(tmp_path / "short", [NAN] * 2)
    assert trained(tmp_path / "spaced", [*[NAN] * 10, GOOD, *[NAN] * 10, GOOD])[1]["skipped"] == 20.0
