"""SFT's loss against a loop that takes one token at a time."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from tokenizers import Tokenizer

from components.data.tokenize import train_bpe
from components.model.gpt import GPT, GPTConfig
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
