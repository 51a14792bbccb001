"""The losses of SFT and of the reward model against loops that take one row at a time."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from tokenizers import Tokenizer

from components.data.tokenize import train_bpe
from components.model.gpt import GPT, GPTConfig
from components.train.reward import last_values, pair_loss, pairs, score, with_scalar_head
from components.train.sft import answer_loss, examples

PROMPTS = {"en": {"user": "Q: {content}\n", "assistant": "A:"}}


@pytest.fixture
def model() -> GPT:
    torch.manual_seed(0)
    preset = yaml.safe_load(Path("conf/models/demo.yaml").read_text())
    small = {"context": 32, "layers": 1, "width": 16, "heads": 2, "kv_heads": 2, "head_width": 8, "mlp_width": 32}
    return GPT(GPTConfig(**preset | small | {"activation": "gelu", "qk_norm": False}, vocab_size=300, head="lm")).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["some text"], 300, 1)


def row(answer: str, lang: str = "en") -> dict:
    talk = [{"role": "user", "content": "say"}, {"role": "assistant", "content": answer}]
    return {"id": "r", "lang": lang, "messages": talk}


def test_the_loss_is_of_the_answers_alone(model: GPT) -> None:
    items = [([5, 6, 7, 8], [False, False, True, True]), ([9, 10, 11], [False, True, False])]
    want = 0.0
    for ids, said in items:
        logits = model(torch.tensor([ids]))[0]
        for t in range(1, len(ids)):
            if said[t]:
                want += F.cross_entropy(logits[t - 1][None], torch.tensor([ids[t]])).item()
    assert float(answer_loss(model, items, 0)[0].detach()) == pytest.approx(want, abs=1e-4)


def test_rows_that_do_not_fit_are_counted(tokenizer: Tokenizer, tmp_path) -> None:  # type: ignore[no-untyped-def]
    from components.artifact import ForjaError

    kept, dropped = examples(tokenizer, [row("ok"), row("much " * 20)], PROMPTS, 20, tmp_path)
    assert len(kept) == 1 and dropped == 1
    with pytest.raises(ForjaError, match="row r is in 'fr'"):
        examples(tokenizer, [row("oui", "fr")], PROMPTS, 20, tmp_path)


def test_values_are_read_at_the_last_token(model: GPT) -> None:
    judge = with_scalar_head(model)
    torch.nn.init.normal_(judge.head.weight)
    sequences = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
    want = [float(judge(torch.tensor([s]))[0, -1]) for s in sequences]
    assert last_values(judge, sequences, 0).tolist() == pytest.approx(want, abs=1e-5)
    assert score(judge, sequences, 0, batch_tokens=4).tolist() == pytest.approx(want, abs=1e-5)
    loss, others = pair_loss(judge, [(sequences[0], sequences[1])], 0)
    assert float(loss.detach()) == pytest.approx(math.log1p(math.exp(want[1] - want[0])), abs=1e-5)
    assert bool(others["accuracy"]) == (want[0] > want[1])


def test_a_new_head_prefers_nothing(model: GPT) -> None:
    judge = with_scalar_head(model)
    assert last_values(judge, [[5, 6], [7]], 0).tolist() == [0.0, 0.0]
    assert torch.equal(judge.wte.weight, model.wte.weight)


def test_equal_answers_are_no_pair(tokenizer: Tokenizer) -> None:
    said = lambda text: {"role": "assistant", "content": text}  # noqa: E731
    ask = {"lang": "en", "messages": [{"role": "user", "content": "say"}]}
    table = [ask | {"chosen": said("a"), "rejected": said("b")}, ask | {"chosen": said("a"), "rejected": said("a")}]
    assert len(pairs(tokenizer, table, PROMPTS, 32)) == 1
