"""DeepSpeed against a plain loop, and a killed run against one that was left alone."""

import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from components.artifact import ForjaError
from components.model import muon
from components.model.engine import Engine
from components.model.gpt import GPT, GPTConfig
from components.model.optim import Optim, optimiser, schedule
from components.model.ranks import device, micro_batch
from components.model.scratch import Saver

OPTIM = Optim(
    lr=1e-2,
    matrix_lr=None,
    schedule="wsd",
    lr_floor=0.1,
    warmup=2,
    decay=0.5,
    weight_decay=0.1,
    beta2=0.95,
    clip=0.5,
    ema=None,
    precision="fp32",
)
MUON = OPTIM.model_copy(update={"matrix_lr": 0.02})
STEPS = 50


def loss_of(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")


def batch(step: int) -> torch.Tensor:
    return torch.randint(0, 40, (8, 17), generator=torch.Generator().manual_seed(step)).to(device())


def steps(trained: Engine, first: int, last: int) -> list[tuple[float, float]]:
    """Train on; the loss and the gradient norm of each step."""
    out = []
    for step in range(first, last):
        trained.set_rate(schedule(OPTIM, step, STEPS))
        for micro in batch(step).split(trained.micro):
            trained.step(loss_of(trained.ds, micro), 8 * 16)
        out.append((trained.sums["loss"] / 128, trained.grad_norm))
    return out


def adamw(model: GPT) -> torch.optim.Optimizer:
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1, "full": 1e-2},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0, "full": 1e-2},
    ]
    return torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-8)


def plain(config: GPTConfig, n: int, muon: bool = False) -> list[tuple[float, float]]:
    """The same training without DeepSpeed."""
    torch.manual_seed(0)
    model = GPT(config).to(device())
    moves = optimiser(model.named_parameters(), MUON) if muon else adamw(model)
    out = []
    for step in range(n):
        for group in moves.param_groups:
            group["lr"] = group["full"] * schedule(OPTIM, step, STEPS)
        loss = loss_of(model, batch(step)) / 128
        loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5))
        moves.step()
        moves.zero_grad()
        out.append((float(loss.detach()), norm))
    return out


@pytest.mark.parametrize("zero", ["0", "1", "2", "3"])
@pytest.mark.parametrize("micro", ["8", "2"])
def test_deepspeed_is_a_plain_loop(zero: str, micro: str, tiny: GPTConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORJA_ZERO", zero)
    monkeypatch.setenv("FORJA_MICRO_BATCH", micro)
    want = plain(tiny, STEPS)
    torch.manual_seed(0)
    got = steps(Engine(GPT(tiny), OPTIM, 8), 0, STEPS)
    assert [loss for loss, _ in got] == pytest.approx([loss for loss, _ in want], abs=1e-5)
    assert [norm for _, norm in got] == pytest.approx([norm for _, norm in want], rel=1e-3)


@pytest.mark.parametrize("zero", ["0", "1", "2", "3"])
def test_so_it_is_with_muon(zero: str, tiny: GPTConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """With products in float32: bfloat16's rounding makes more of each last bit than 1e-5. Matrices come by twos."""
    monkeypatch.setattr(muon, "PRODUCTS", torch.float32)
    monkeypatch.setattr(muon, "AT_ONCE", 2 * 16 * 64)
    monkeypatch.setenv("FORJA_ZERO", zero)
    want = plain(tiny, STEPS, muon=True)
    torch.manual_seed(0)
    got = steps(Engine(GPT(tiny), MUON, 8), 0, STEPS)
    assert [loss for loss, _ in got] == pytest.approx([loss for loss, _ in want], abs=1e-5)
    assert [norm for _, norm in got] == pytest.approx([norm for _, norm in want], rel=1e-3)


@pytest.mark.parametrize(("zero", "params"), [("1", ""), ("2", ""), ("3", ""), ("3", "cpu")])
def test_offloaded_to_the_cpu_it_is_the_same(
    zero: str, params: str, tiny: GPTConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORJA_ZERO", zero)
    monkeypatch.setenv("FORJA_OFFLOAD_OPTIMIZER", "cpu")
    monkeypatch.setenv("FORJA_OFFLOAD_PARAMS", params)
    want = plain(tiny, 6)
    torch.manual_seed(0)
    trained = Engine(GPT(tiny), OPTIM, 8)
    got = steps(trained, 0, 3)
    with Saver(tmp_path, {"model": trained}) as saver:
        saver.save(3, {})
    undisturbed = steps(trained, 3, 6)
    again = Engine(GPT(tiny), OPTIM, 8)
    assert Saver(tmp_path, {"model": again}).resume() == {"step": 3}
    assert steps(again, 3, 6) == undisturbed
    wanted = trained.finished().state_dict()
    for name, p in again.finished().state_dict().items():
        assert torch.equal(p, wanted[name]), name
    got += undisturbed
    assert [loss for loss, _ in got] == pytest.approx([loss for loss, _ in want], abs=1e-5)
    assert [norm for _, norm in got] == pytest.approx([norm for _, norm in want], rel=1e-3)


def test_what_cannot_be_had_is_said(tiny: GPTConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(said: str, **environment: str) -> None:
        with monkeypatch.context() as patch, pytest.raises(ForjaError, match=said):
            for name, value in environment.items():
                patch.setenv(name, value)
            Engine(GPT(tiny), OPTIM, 8)

    refused("FORJA_OFFLOAD_PARAMS=cpu: needs FORJA_ZERO=3", FORJA_OFFLOAD_PARAMS="cpu", FORJA_ZERO="2")
    refused("OPTIMIZER=/disk: is neither cpu nor nvme:FOLDER", FORJA_OFFLOAD_OPTIMIZER="/disk", FORJA_ZERO="3")
    refused("not together with FORJA_ZERO=3", FORJA_COMPILE="1", FORJA_ZERO="3")


def test_no_compiler_is_said(tiny: GPTConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORJA_COMPILE", "1")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ForjaError, match="needs a C\\+\\+ compiler, and no-such-compiler is not there"):
        Engine(GPT(tiny), OPTIM, 8)


@pytest.mark.nightly
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize(("zero", "recompute"), [("0", "0"), ("2", "1")])
def test_compiled_it_is_the_same(
    zero: str, recompute: str, modern: GPTConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To 1e-4 over 20 steps; nothing is compiled unasked, and not what is trained once it is finished."""
    graphs = torch._dynamo.utils.counters["stats"]
    torch._dynamo.reset()
    graphs.clear()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("FORJA_ZERO", zero)
    monkeypatch.setenv("FORJA_RECOMPUTE", recompute)
    torch.manual_seed(0)
    want = steps(Engine(GPT(modern), OPTIM, 8), 0, 20)
    assert not graphs and not list(tmp_path.iterdir())
    monkeypatch.setenv("FORJA_COMPILE", "1")
    torch.manual_seed(0)
    trained = Engine(GPT(modern), OPTIM, 8)
    got = steps(trained, 0, 20)
    compiled = graphs["unique_graphs"]
    assert compiled > 0
    assert [loss for loss, _ in got] == pytest.approx([loss for loss, _ in want], abs=1e-4)
    trained.finished()(batch(0)[:3, :7])
    assert graphs["unique_graphs"] == compiled


def test_recomputing_changes_no_bit(tiny: GPTConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    kept = steps(Engine(GPT(tiny), OPTIM, 8), 0, 4)
    monkeypatch.setenv("FORJA_RECOMPUTE", "1")
    torch.manual_seed(0)
    trained = Engine(GPT(tiny), OPTIM, 8)
    assert trained.model.recompute and steps(trained, 0, 4) == kept


@pytest.mark.parametrize(
    ("change", "zero"),
    [
        ({}, "0"),
        ({"precision": "bf16"}, "0"),
        ({"matrix_lr": 0.02, "ema": 0.9}, "0"),
        ({}, "1"),
        ({"ema": 0.9}, "2"),
        ({"ema": 0.9}, "3"),
        ({"matrix_lr": 0.02, "ema": 0.9}, "2"),
        ({"matrix_lr": 0.02, "precision": "bf16"}, "3"),
    ],
)
def test_resumed_is_undisturbed(
    change: dict, zero: str, tiny: GPTConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORJA_ZERO", zero)
    optim = OPTIM.model_copy(update=change)
    torch.manual_seed(0)
    whole = Engine(GPT(tiny), optim, 8)
    steps(whole, 0, 3)
    with Saver(tmp_path, {"model": whole}) as saver:
        saver.save(3, {"kl_coef": 0.1})
        drawn = torch.rand(3)
    losses = steps(whole, 3, 6)

    torch.manual_seed(1)
    again = Engine(GPT(tiny), optim, 8)
    assert Saver(tmp_path, {"model": again}).resume() == {"step": 3, "kl_coef": 0.1}
    assert torch.equal(torch.rand(3), drawn)
    assert steps(again, 3, 6) == losses
    wanted = whole.finished().state_dict()
    for name, p in again.finished().state_dict().items():
        assert torch.equal(p, wanted[name]), name


def test_the_newest_whole_checkpoint_is_used(tiny: GPTConfig, tmp_path: Path) -> None:
    trained = Engine(GPT(tiny), OPTIM, 8)
    with Saver(tmp_path, {"model": trained}) as saver:
        for step in (1, 2, 3):
            saver.save(step, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]  # two are kept
    weights = next((tmp_path / "step-00000003").rglob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    state = Saver(tmp_path, {"model": trained}).resume()
    assert state is not None and state["step"] == 2
    (tmp_path / "step-00000002" / "record.json").unlink()
    assert Saver(tmp_path, {"model": trained}).resume() is None


def test_schedule_by_hand() -> None:
    """Two steps up, the full rate, and from step 5 of 10 down to a tenth: 1 -> 0.1 + 0.9 * left / 5."""
    assert [schedule(OPTIM, s, 10) for s in (0, 1, 4, 5, 7, 10)] == pytest.approx([0.5, 1, 1, 1, 0.64, 0.1])
    assert schedule(OPTIM.model_copy(update={"decay": 0.0, "warmup": 0}), 9, 10) == 1.0
    """Cosine: after two steps up, a quarter of the way down at step 4 (cos 45 degrees), half at 6, a tenth at 10."""
    cosine = OPTIM.model_copy(update={"schedule": "cosine"})
    want = [0.5, 1, 1, 0.1 + 0.9 * (1 + 0.5**0.5) / 2, 0.55, 0.1]
    assert [schedule(cosine, s, 10) for s in (0, 1, 2, 4, 6, 10)] == pytest.approx(want)


def test_the_average_follows_the_weights(tiny: GPTConfig) -> None:
    """Against a plain loop over what the weights were after each step: decay min(0.9, (1 + t) / (10 + t))."""
    torch.manual_seed(0)
    trained = Engine(GPT(tiny), OPTIM.model_copy(update={"ema": 0.9}), 8)
    average = trained.model.norm.weight.detach().clone()
    for t in range(1, 6):
        steps(trained, t, t + 1)
        decay = min(0.9, (1 + t) / (10 + t))
        average = decay * average + (1 - decay) * trained.model.norm.weight.detach()
    torch.testing.assert_close(trained.finished().norm.weight.detach(), average)


def test_a_micro_batch_that_does_not_divide_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORJA_MICRO_BATCH", "3")
    with pytest.raises(ForjaError, match="does not divide the batch of 8"):
        micro_batch(8)
