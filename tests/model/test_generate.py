"""Generation with a cache against recomputation of the whole sequence for every token."""

import pytest
import torch

from components.model.generate import generate
from components.model.gpt import GPT, GPTConfig

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11]]


def slow_greedy(model: GPT, prompt: list[int], n: int, stop: int) -> list[int]:
    ids = list(prompt)
    for _ in range(n):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        if ids[-1] == stop:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("which", ["tiny", "modern"])
def test_greedy_is_the_full_recomputation(which: str, request: pytest.FixtureRequest) -> None:
    model = GPT(request.getfixturevalue(which)).eval()
    for p in model.parameters():
        p.data.mul_(4)  # apart enough that the likeliest token is not a near tie
    if model.smear is not None:
        torch.nn.init.normal_(model.smear)
    want = [slow_greedy(model, p, 12, stop=0) for p in PROMPTS]
    assert generate(model, PROMPTS, max_new_tokens=12, stop=0) == want
    # A stop token that some answers reach early: those leave the batch, the others do not notice.
    stop = want[0][4]
    want = [slow_greedy(model, p, 12, stop) for p in PROMPTS]
    assert generate(model, PROMPTS, max_new_tokens=12, stop=stop) == want


def test_a_request_alone_or_among_others(tiny: GPTConfig) -> None:
    model = GPT(tiny).eval()
    together = generate(model, PROMPTS, max_new_tokens=10, stop=0, temperature=1.0, seed=3)
    alone = generate(model, PROMPTS[:1], max_new_tokens=10, stop=0, temperature=1.0, seed=3)
    assert alone[0] == together[0]
    assert generate(model, PROMPTS, max_new_tokens=10, stop=0, temperature=1.0, seed=4) != together


def test_sampling_follows_the_probabilities(tiny: GPTConfig) -> None:
    model = GPT(tiny).eval()
    for p in model.parameters():
        p.data.mul_(6)
    probs = torch.softmax(model(torch.tensor([[1]]))[0, -1], -1)
    drawn = generate(model, [[1]] * 4000, max_new_tokens=1, stop=-1, temperature=1.0, seed=1)
    share = torch.bincount(torch.tensor([d[0] for d in drawn]), minlength=40) / 4000
    assert (share - probs).abs().max() < 0.03
    likeliest = set(probs.topk(3).indices.tolist())
    assert {
        d[0] for d in generate(model, [[1]] * 200, max_new_tokens=1, stop=-1, temperature=1.0, top_k=3)
    } <= likeliest
    assert {d[0] for d in generate(model, [[1]] * 50, max_new_tokens=1, stop=-1, temperature=1.0, top_p=1e-6)} == {
        int(probs.argmax())
    }


def test_the_context_is_the_limit(tiny: GPTConfig) -> None:
    model = GPT(tiny).eval()
    answers = generate(model, [list(range(1, 31)), [1]], max_new_tokens=100, stop=-1)
    assert [len(a) for a in answers] == [31, 31]  # 32 positions: the prompt keeps one, the answer takes the rest
    with pytest.raises(ValueError, match="empty prompt"):
        generate(model, [[]], max_new_tokens=1, stop=0)
