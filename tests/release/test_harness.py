"""lm-eval's tasks on our models: what our adapter answers, against lm-eval's own `hf` model of the same weights."""

from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from components.artifact import ForjaError
from components.model.checkpoint import load, save
from components.model.gpt import GPT
from components.model.interop import export_model
from components.release import continuations
from components.release.continuations import gathered, groups, scores
from components.release.harness import Adapter

LOGPROB = 1e-3  # nats by which the two may differ


def asked(pairs: list[tuple[str, str]]) -> list[Instance]:
    return [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]


def agree(ours: list[tuple[float, bool]], theirs: list[tuple[float, bool]]) -> None:
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    for (a, _), (b, _) in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, abs=LOGPROB)


@pytest.fixture
def both(save_checkpoint, tmp_path: Path):
    """A tiny model as our adapter has it and, exported, as lm-eval's `hf` has it."""

    def make(taught: bool = False, **shape: object) -> tuple[Adapter, HFLM]:
        folder = save_checkpoint("model", seed=3, **shape)
        if taught:
            teach(folder)
        export_model(folder, tmp_path / "hf")
        theirs = HFLM(pretrained=str(tmp_path / "hf"), device="cpu", batch_size=4, dtype="float32")
        return Adapter(load(folder, "cpu"), folder), theirs

    return make


def teach(folder: Path) -> None:
    """Let the model learn a line by heart, so that what it says varies, and ends."""
    model, tokenizer, prompts = load(folder, "cpu")
    ids = torch.tensor([[*tokenizer.encode(WORDS).ids, tokenizer.token_to_id("<|end|>")]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(80):
        loss = model(ids[:, :-1], targets=ids[:, 1:]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    save(model, folder, folder.parent / "tokenizer.json", prompts)


WORDS = "the answer is la respuesta es a question of the day"
QUESTIONS = [f"{WORDS[: 9 + 5 * i]} {i}?" for i in range(5)]
CHOICES = [" the answer", " la respuesta es la respuesta", " no", " ?"]


def test_scores_are_hf_s(both) -> None:
    ours, theirs = both(context=64)
    pairs = [(q, c) for q in QUESTIONS for c in CHOICES]
    pairs += [
        ("", "the answer"),
        ("the answer is ", "yes"),
        ("x" * 90, " the answer"),
        ("the", " answer"),
    ]  # cut, spaces
    pairs += [pairs[0], ("<|end|>the", " answer")]
    agree(ours.loglikelihood(asked(pairs)), theirs.loglikelihood(asked(pairs), disable_tqdm=True))


def test_both_ways_to_tokens_give_the_same(both) -> None:
    ours, _ = both(context=64)
    texts = [*QUESTIONS, *CHOICES, "", "  la\n\nes", "Ñandú 12 345 <|", "🙂 the"]
    assert ours.fast is not None
    found = ours.encoded(texts)
    assert found == {text: ours.tokenizer.encode(text).ids for text in texts}
    end = ours.tokenizer.token_to_id("<|end|>")
    assert ours.encoded(["the<|end|>"])["the<|end|>"][-1] == end  # in a benchmark's text a mark is one
    ours.fast = None
    assert ours.encoded(texts) == found


def test_examples_that_all_questions_begin_with_are_read_once(both, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = both(context=512)
    examples = "".join(f"{q} the answer\n\n" for q in QUESTIONS * 4)
    pairs = [(examples + q, c) for q in QUESTIONS for c in CHOICES]
    cores = torch.get_num_threads()
    monkeypatch.setattr(continuations, "BATCH", max(1, 64 // cores))  # several batches behind one beginning
    read: list[int] = []
    hidden = ours.reader.hidden
    monkeypatch.setattr(ours.reader, "hidden", lambda ids, **how: (read.append(ids.numel()), hidden(ids, **how))[1])
    found = ours.loglikelihood(asked(pairs))
    once = len(ours.tok_encode(examples))
    assert len(read) > 2 and sum(read) < 2 * once  # `hf` reads them 20 times
    agree(found, theirs.loglikelihood(asked(pairs), disable_tqdm=True))


@pytest.mark.parametrize(
    "shape",
    [
        {"smear": True},
        {"smear": True, "positions": "rotary", "qk_norm": True, "activation": "relu2"},  # the demo's
        {"window": 9},
        {"window": 9, "smear": True, "positions": "rotary", "kv_heads": 1, "logit_cap": 5.0},
        {"block": "parallel", "norm": "rms"},
    ],
)
def test_every_kind_of_model_scores_as_its_own_plain_pass(random_model_of, shape: dict[str, object]) -> None:
    model = random_model_of(shape)
    torch.manual_seed(1)
    draw = lambda n: torch.randint(model.config.vocab_size, (n,)).tolist()  # noqa: E731
    begin = draw(60)
    requests = [(context, draw(n)) for context in [begin + draw(7) for _ in range(9)] for n in (1, 2, 5, 5)]
    requests += [(draw(3), draw(4)), (draw(1), draw(1)), (draw(200), draw(6)), (begin[:30], draw(2))]
    for (context, continuation), found in zip(requests, scores(model, requests), strict=True):
        row = torch.tensor([(context + continuation)[-(model.config.context + 1) :]])
        said = model(row[:, :-1])[0, -len(continuation) :].log_softmax(-1)
        want = said.gather(1, torch.tensor(continuation)[:, None]).sum().item()
        assert found.logprob == pytest.approx(want, abs=1e-4)
        assert found.greedy == (said.argmax(-1).tolist() == continuation)
    assert any(shared for shared, _ in groups(gathered(requests, model.config.context)))


@pytest.fixture
def random_model_of(tokenizer):
    def make(shape: dict[str, object]) -> GPT:
        from conftest import make_model

        small = make_model(tokenizer, seed=5, context=128)
        torch.manual_seed(5)
        model = GPT(small.config.model_validate(small.config.model_dump() | shape))
        for p in model.parameters():
            p.data += 0.15 * torch.randn_like(p)
        return model.eval()

    return make


def test_groups_by_hand() -> None:
    """Four contexts with 300 tokens in common, three with 200 others, one alone: two passes, and the rest plain."""
    first, second = list(range(300)), list(range(1000, 1200))
    contexts = [[*first, 5, i] for i in range(4)] + [[*second, i] for i in range(3)] + [[7, 7]]
    found = sorted((shared, len(items)) for shared, items in groups(gathered([(c, [1]) for c in contexts], 400)))
    assert found == [(0, 1), (200, 3), (301, 4)]


def test_what_does_not_fit_is_said(both) -> None:
    ours, _ = both(context=32)
    with pytest.raises(ForjaError, match=r"--tasks a task: has a choice of 60 tokens, and .*model reads 1 to 32;"):
        ours.loglikelihood(asked([("the", "xyz" * 20)]))
    with pytest.raises(ValueError, match="a continuation of 33 tokens does not fit the model's context of 32"):
        scores(ours.model, [([1], [2] * 33)])
    with pytest.raises(ValueError, match="need a token each"):
        scores(ours.model, [([], [2])])


def test_rolling_windows_are_hf_s(both) -> None:
    ours, theirs = both(context=24)
    texts = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate([WORDS * 3, "the", WORDS])]
    found, want = ours.loglikelihood_rolling(texts), theirs.loglikelihood_rolling(texts, disable_tqdm=True)
    assert found == pytest.approx(want, abs=LOGPROB)


def test_greedy_text_is_hf_s(both) -> None:
    ours, theirs = both(taught=True, context=64)
    kwargs = [{"until": [" es", " day"], "max_gen_toks": 24}, {"until": [], "max_gen_toks": 5, "do_sample": False}]
    pairs = [(question, k) for question in QUESTIONS for k in kwargs]
    texts = [Instance("generate_until", {}, pair, i) for i, pair in enumerate(pairs)]
    theirs.batch_size_per_gpu = 1  # its batches pad on the left
    found = ours.generate_until(texts)
    assert found == theirs.generate_until(texts, disable_tqdm=True)
    assert len(set(found)) > 4
    with pytest.raises(ForjaError, match="a task wants num_beams"):
        ours.generate_until([Instance("generate_until", {}, ("the", {"num_beams": 4}), 0)])
