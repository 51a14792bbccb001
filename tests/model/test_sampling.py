"""How tokens are chosen: numbers worked by hand, and transformers' processors as oracle."""

import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from components.model.generate import generate
from components.model.gpt import GPT, GPTConfig
from components.model.sampling import (
    Sampling,
    drawn,
    filtered,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    logprobs,
    penalised,
    uniform,
)

PROBS = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.7, 0.1, 0.1, 0.1]])
LOGITS = PROBS.log()


def kept(logits: torch.Tensor) -> list[list[int]]:
    return [row.isfinite().nonzero().flatten().tolist() for row in logits]


def test_by_hand() -> None:
    assert kept(keep_top_k(LOGITS, 2)) == [[1, 3], [0, 1, 2, 3]]  # three tie for the second place
    assert kept(keep_top_k(LOGITS, 9)) == [[0, 1, 2, 3]] * 2
    assert kept(keep_top_p(LOGITS, 0.65)) == [[1, 3], [0]]  # 0.4 + 0.3 passes it; 0.7 alone does
    assert kept(keep_top_p(LOGITS, 0.75)) == [[1, 2, 3], [0, 1]]
    assert kept(keep_top_p(LOGITS, 1e-9)) == [[1], [0]]
    assert kept(keep_min_p(LOGITS, 0.6)) == [[1, 3], [0]]  # at least 0.24; at least 0.42
    seen = torch.tensor([[True, False, True, False]])
    assert penalised(torch.tensor([[2.0, 2.0, -2.0, -2.0]]), seen, 4.0).tolist() == [[0.5, 2.0, -8.0, -2.0]]
    # Cumulated: 0.1, 0.5, 0.7, 1.0.
    row = LOGITS[:1].expand(5, 4)
    assert drawn(row, torch.tensor([0.0, 0.09, 0.11, 0.69, 0.99])).tolist() == [0, 0, 1, 2, 3]
    assert drawn(keep_top_k(LOGITS[:1], 1), torch.tensor([0.999999])).tolist() == [1]
    torch.testing.assert_close(logprobs(LOGITS + 3, torch.tensor([1, 0])), torch.tensor([0.4, 0.7]).log())


@pytest.mark.parametrize(
    "how",
    [
        Sampling(temperature=0.7),
        Sampling(temperature=1.0, top_k=7),
        Sampling(temperature=1.3, top_p=0.8),
        Sampling(temperature=1.0, min_p=0.1),
        Sampling(temperature=1.0, repetition_penalty=1.7),
        Sampling(temperature=0.8, top_k=20, top_p=0.9, min_p=0.05, repetition_penalty=1.2),
    ],
)
def test_against_transformers(how: Sampling) -> None:
    logits = 3 * torch.randn(50, 64)
    ids = torch.randint(0, 64, (50, 12))
    theirs = LogitsProcessorList([TemperatureLogitsWarper(how.temperature)])
    if how.repetition_penalty != 1:
        theirs.insert(0, RepetitionPenaltyLogitsProcessor(how.repetition_penalty))
    if how.top_k:
        theirs.append(TopKLogitsWarper(how.top_k))
    if how.top_p < 1:
        theirs.append(TopPLogitsWarper(how.top_p))
    if how.min_p:
        theirs.append(MinPLogitsWarper(how.min_p))
    seen = torch.zeros(50, 64, dtype=torch.bool).scatter(1, ids, True)
    ours = filtered(penalised(logits, seen, how.repetition_penalty), how)
    torch.testing.assert_close(ours, theirs(ids, logits.clone()), rtol=1e-6, atol=1e-6)


def test_a_stream_is_its_seeds_own() -> None:
    assert torch.equal(uniform(7, 5), uniform(7, 9)[:5])
    assert not torch.equal(uniform(7, 5), uniform(8, 5))
    assert uniform(-1, 1000).min() >= 0 and uniform(-1, 1000).max() < 1


def test_sampling_follows_the_probabilities(tiny: GPTConfig) -> None:
    model = GPT(tiny).eval()
    for p in model.parameters():
        p.data.mul_(6)
    with torch.no_grad():
        probs = torch.softmax(model(torch.tensor([[1]]))[0, -1], -1)
    said = generate(model, [[1]] * 4000, max_new_tokens=1, stop=-1, temperature=1.0, seed=1)
    share = torch.bincount(torch.tensor([d[0] for d in said]), minlength=40) / 4000
    assert (share - probs).abs().max() < 0.03
    likeliest = set(probs.topk(3).indices.tolist())
    said = generate(model, [[1]] * 200, max_new_tokens=1, stop=-1, temperature=1.0, top_k=3)
    assert {d[0] for d in said} == likeliest
    said = generate(model, [[1]] * 50, max_new_tokens=1, stop=-1, temperature=1.0, top_p=1e-6)
    assert {d[0] for d in said} == {int(probs.argmax())}


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"temperature": 1e-38},  # logits over it are infinite, and no token is the likeliest
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_p": 1.5},
        {"top_p": float("nan")},
        {"min_p": 2.0},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": float("inf")},
        {"repetition_penalty": float("nan")},
    ],
)
def test_settings_that_mean_nothing(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sampling(**wrong).check()  # type: ignore[arg-type]
