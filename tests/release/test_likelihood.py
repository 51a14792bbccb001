import lzma
import math
from types import SimpleNamespace

import pytest
import torch

from components.data.chat import SEPARATOR, encode_prompt, encode_text, special
from components.model.checkpoint import Checkpoint
from components.model.losses import text_bits_per_byte, windows
from components.release.likelihood import choice_scores, sequence_kl, xz_bits_per_byte

TEXT = "The answer to the question is in the answer. La respuesta está en la pregunta.\n\n" * 3


@pytest.mark.parametrize("n", [2, 15, 16, 17, 24, 25, 100, 101])
def test_windows_score_every_token_once_with_half_a_context_before_it(n):
    cut = windows(n, 16)
    assert [i for _, end, first in cut for i in range(first, end)] == list(range(1, n))
    assert all(end - start <= 16 for start, end, _ in cut)
    assert all(first - start >= 8 for start, _, first in cut[1:])


def slow_nats(model, tokens):
    """One token at a time: each by a forward pass over what its window shows before it."""
    half, total = model.config.context // 2, 0.0
    for i in range(1, len(tokens)):
        context = model.config.context
        start = 0 if i < context else ((i - context) // half + 1) * half
        with torch.no_grad():
            logits = model(torch.tensor([tokens[start:i]]))[0, -1]
        total -= torch.log_softmax(logits.double(), -1)[tokens[i]].item()
    return total


def test_bits_per_byte_equal_a_loop_of_one_token_at_a_time(tokenizer, random_model):
    model = random_model(seed=3, context=16)
    separator = special(tokenizer, SEPARATOR)
    documents = [*encode_text(tokenizer, TEXT), separator, *encode_text(tokenizer, "abc"), separator]
    n_bytes = len(TEXT.encode()) + 3
    assert len(documents) > 80
    want = slow_nats(model, [separator, *documents]) / math.log(2) / n_bytes
    assert text_bits_per_byte(model, documents, n_bytes, separator) == pytest.approx(want, abs=1e-5)


def test_xz_is_the_length_of_the_file_that_xz_writes():
    text = (TEXT * 20).encode()
    assert xz_bits_per_byte(text) == 8 * len(lzma.compress(text, preset=9)) / len(text)
    assert xz_bits_per_byte(text) < 1.0


def test_choice_scores_equal_a_loop_over_the_tokens_of_each_choice(tokenizer, random_model, prompts):
    model = random_model(seed=4)
    rows = [
        {"lang": "en", "question": "What is it?", "choices": ["the answer", "la respuesta", "A", "ninguna, señor"]},
        {"lang": "es", "question": "¿Qué es?", "choices": ["respuesta", "the the the", "no", "sí"]},
    ]
    found = choice_scores(Checkpoint(model, tokenizer, prompts), rows, prompts)
    for row, scores in zip(rows, found, strict=True):
        prompt = encode_prompt(tokenizer, [{"role": "user", "content": row["question"]}], prompts[row["lang"]])
        for choice, score in zip(row["choices"], scores, strict=True):
            ids, total = list(prompt), 0.0
            for token in encode_text(tokenizer, " " + choice):
                with torch.no_grad():
                    total += torch.log_softmax(model(torch.tensor([ids]))[0, -1].double(), -1)[token].item()
                ids.append(token)
            assert score == pytest.approx(total / len(choice.encode()), abs=1e-5)


def test_a_choice_longer_than_the_context_keeps_its_end(tokenizer, random_model, prompts):
    model = random_model(seed=4, context=16)
    row = {"lang": "en", "question": "What? " * 30, "choices": ["one", "x" * 200]}
    (scores,) = choice_scores(Checkpoint(model, tokenizer, prompts), [row], prompts)
    assert all(math.isfinite(s) and s < 0 for s in scores)


class Fixed(torch.nn.Module):
    """A model that gives every token the same distribution after anything."""

    def __init__(self, probabilities):
        super().__init__()
        self.wte = torch.nn.Embedding(len(probabilities), 1)
        self.config = SimpleNamespace(vocab_size=len(probabilities))
        self.logprobs = torch.tensor(probabilities).log()

    def hidden(self, ids):
        return ids[..., None].float()

    def logits(self, hidden):
        return self.logprobs.expand(*hidden.shape[:-1], -1)


def test_kl_by_hand():
    policy, reference = Fixed([0.5, 0.25, 0.25]), Fixed([0.25, 0.25, 0.5])
    drift = sequence_kl(policy, reference, [[0, 0, 0], [1], [2, 1]], [[0, 0], [2], [1, 0, 2]], pad=0)
    # Token 0 counts log 2, token 1 nothing, token 2 minus log 2; the prompt's tokens do not count.
    assert drift == pytest.approx([2 * math.log(2), -math.log(2), 0.0], abs=1e-6)
