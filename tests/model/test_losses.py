import math

import pytest
import torch

from components.model.gpt import GPT, GPTConfig
from components.model.losses import bits_per_byte, by_length, preference_loss, token_logprobs


def test_token_logprobs_against_one_at_a_time(tiny: GPTConfig) -> None:
    model = GPT(tiny).eval()
    sequences = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7]]
    got = token_logprobs(model, sequences, pad=0, batch_tokens=12)
    for ids, logprobs in zip(sequences, got, strict=True):
        want = [torch.log_softmax(model(torch.tensor([ids[:i]]))[0, -1], -1)[ids[i]] for i in range(1, len(ids))]
        torch.testing.assert_close(logprobs, torch.stack(want).detach(), atol=1e-5, rtol=1e-5)


def test_batches_by_length_hold_every_row_once_and_their_budget() -> None:
    lengths = [5, 1, 9, 3, 3, 20, 2]
    batches = list(by_length(lengths, 10))
    assert sorted(i for b in batches for i in b) == list(range(7))
    assert all(len(b) * max(lengths[i] for i in b) <= 10 or len(b) == 1 for b in batches)


def test_bits_per_byte_by_hand() -> None:
    assert bits_per_byte(8 * math.log(2), 4) == pytest.approx(2.0)  # 8 bits over 4 bytes


def test_preference_loss_by_hand() -> None:
    """-log sigmoid(ln 3) = -log(3/4)."""
    loss = preference_loss(torch.tensor([math.log(3.0)]), torch.tensor([0.0]))
    assert float(loss) == pytest.approx(math.log(4 / 3))
