"""SFT: what is learnt, that packing changes nothing, adapters, replay, and rows that are hardly rows."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from safetensors.torch import load_file
from tokenizers import Tokenizer

sys.path.append(str(Path(__file__).parent))
from test_resume import CONFIGS, PROMPTS, SHAPE

from components.artifact import ForjaError
from components.data import tokenize as tokenizing
from components.data.batches import windows
from components.data.chat import END, SEPARATOR, encode, special
from components.data.tokenize import train_bpe
from components.log import Metrics, silent
from components.model.checkpoint import load, save
from components.model.generate import generate
from components.model.gpt import GPT, GPTConfig
from components.model.lora import Lora, LowRank, adapt, merge, without
from components.train import sft
from components.train.pretrain import packed_loss
from components.train.sft import Example, answer_loss, examples, remembered, replayed, side_by_side

CFG = sft.Config.model_validate(
    CONFIGS[sft].model_dump()
    | {"precision": "fp32", "matrix_lr": None, "packing": "padded", "replay": 0, "z_loss": 0.0}
)
SHAPES = {
    "rotary": {},
    "learned": {"positions": "learned", "smear": False, "norm": "layer", "activation": "gelu"},
    "window": {"window": 5, "kv_heads": 2, "activation": "swiglu", "norm": "rms"},
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["some text"], 300, 1)


def gpt(name: str = "rotary") -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(**SHAPE | SHAPES[name], vocab_size=300, head="lm")).eval()


def says(text: str) -> dict:
    return {"role": "assistant", "content": text}


def asks(text: str) -> dict:
    return {"role": "user", "content": text}


def row(answer: str, ask: str = "say", i: int = 0, split: str = "train", lang: str = "en") -> dict:
    return {"id": f"r{i}", "lang": lang, "split": split, "messages": [asks(ask), says(answer)]}


def some(count: int, seed: int = 0) -> list[Example]:
    """Examples of 2 to 40 tokens in which the assistant speaks once or twice."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(count):
        n = int(rng.integers(2, 40))
        said = rng.random(n) < 0.4
        said[-1] = True
        out.append((rng.integers(4, 300, n).tolist(), said.tolist()))
    return out


def test_the_loss_is_of_the_answers_alone() -> None:
    model, items = gpt(), some(5)
    want = 0.0
    for ids, said in items:
        logits = model(torch.tensor([ids])).detach()[0]
        want += sum(
            F.cross_entropy(logits[t - 1][None], torch.tensor([ids[t]])).item() for t in range(1, len(ids)) if said[t]
        )
    assert float(answer_loss(model, items, 0)[0].detach()) == pytest.approx(want, rel=1e-5)
    packed, _ = packed_loss(model, side_by_side(items, 64, 0))
    assert float(packed.detach()) == pytest.approx(want, rel=1e-5)


def test_every_turn_of_the_assistant_is_learnt(tokenizer: Tokenizer) -> None:
    talk = {**row(""), "messages": [asks("one"), says("two"), asks("three"), says("four")]}
    ((ids, said),), _ = examples(tokenizer, [talk], PROMPTS, 64)
    learnt = tokenizer.decode([i for i, by in zip(ids, said, strict=True) if by], skip_special_tokens=False)
    assert learnt == f" two{END} four{END}"


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("z", [0.0, 1e-3])
def test_packed_and_unpacked_gradients_are_equal(name: str, z: float) -> None:
    """Batches of several sizes; an example alone, and one as long as the context, are among them."""
    model = gpt(name)
    for size in (1, 2, 7, 30):
        items = [*some(size, seed=size), ([*range(4, 4 + 65)], [False] * 60 + [True] * 5)]
        found = {}
        for how in ("padded", "packed"):
            model.zero_grad()
            if how == "padded":
                loss, _ = answer_loss(model, items, 0, z)
            else:
                loss, _ = packed_loss(model, side_by_side(items, 64, 0), z)
            (loss / sum(sum(said[1:]) for _, said in items)).backward()
            found[how] = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        for key, grad in found["padded"].items():
            torch.testing.assert_close(
                found["packed"][key], grad, atol=1e-5, rtol=0, msg=lambda m, key=key: f"{key}: {m}"
            )
        assert max(float(grad.abs().max()) for grad in found["padded"].values()) > 1e-2


def test_what_stands_beside_an_example_does_not_matter() -> None:
    """Other neighbours in the row, the same loss of its own: neither attention nor positions cross."""
    model, (one, *others) = gpt(), some(12)
    alone = float(answer_loss(model, [one], 0)[0].detach())
    for neighbours in (others[:1], others[1:4], others):
        together = float(packed_loss(model, side_by_side([*neighbours, one], 64, 0))[0].detach())
        rest = float(packed_loss(model, side_by_side(neighbours, 64, 0))[0].detach())
        assert together - rest == pytest.approx(alone, abs=2e-3)


def test_examples_fill_windows_and_none_is_lost() -> None:
    items = some(50)
    found = side_by_side(items, 64, 0)
    width = len(found[0].ids)
    assert width <= 64 and all(len(w.ids) == len(w.targets) == sum(w.lengths) == width for w in found)
    assert sum(int((w.targets >= 0).sum()) for w in found) == sum(sum(said[1:]) for _, said in items)
    assert len(found) < 0.6 * len(items) and min(min(w.lengths) for w in found) >= 1


def test_rows_that_do_not_fit_are_cut_or_counted(tokenizer: Tokenizer) -> None:
    rows = [row("ok"), row("much " * 20), row("ok", ask="much " * 40), row(""), row(" \n")]
    kept, dropped = examples(tokenizer, rows, PROMPTS, 30)
    assert len(kept) == 1 and dropped == {"long": 2, "empty": 2}
    kept, dropped = examples(tokenizer, rows, PROMPTS, 30, "cut")
    assert [len(ids) <= 30 for ids, _ in kept] == [True, True] and dropped == {"long": 1, "empty": 2}
    (short, _), (cut, said) = kept
    assert len(cut) == 30 and cut[:2] == short[:2] and sum(said) == sum(kept[0][1])
    with pytest.raises(ForjaError, match="row r0 is in 'fr'"):
        examples(tokenizer, [row("oui", lang="fr")], PROMPTS, 30)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with its shards, and a model to start from."""
    root = tmp_path_factory.mktemp("sft")
    for name in ("validate", "tokenize"):
        (root / name).mkdir()
    texts = [f"Document {i} has some words to learn from, number {i * i}. " * 4 for i in range(40)]
    corpus = [
        {"id": str(i), "lang": "en", "split": ("train", "val", "test")[i % 3], "text": t} for i, t in enumerate(texts)
    ]
    (root / "validate" / "corpus.jsonl").write_text("".join(json.dumps(r) + "\n" for r in corpus))
    (root / "validate" / "instructions.jsonl").touch()
    cfg = tokenizing.Config(vocab_size=300, min_frequency=1, sample_mb=9, tokenizer=None)
    tokenizing.run(cfg, root / "validate", root / "tokenize", silent)
    save(gpt(), root / "pretrain", root / "tokenize" / "tokenizer.json")
    return root


def stage(chain: Path, to: Path, rows: list[dict], **changes: object) -> tuple[GPT, dict[str, float]]:
    """The stage on these rows: the model that it leaves, all of whose weights are finite, and its metrics."""
    for name in ("validate", "out", "scratch"):
        (to / name).mkdir(parents=True)
    (to / "validate" / "instructions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    cfg = sft.Config.model_validate(CFG.model_dump() | changes)
    folders = (to / "validate", chain / "tokenize", chain / "pretrain", to / "out", to / "scratch")
    metrics = sft.run(cfg, *folders, silent)
    assert all(torch.isfinite(w).all() for w in load_file(to / "out" / "model.safetensors").values())
    assert all(math.isfinite(value) for value in metrics.values())
    return load(to / "out", "cpu").model, metrics


def rows(train: int, val: int) -> list[dict]:
    told = [row(f"{2 * i}.", f"{i} + {i}?", i) for i in range(train)]
    return told + [row(f"{2 * i}.", f"{i} + {i}?", 100 + i, "val") for i in range(val)]


@pytest.mark.parametrize(
    ("table", "why"),
    [
        ([], "0 training and 0 held-out rows"),
        (rows(4, 0), "4 training and 0 held-out rows"),
        (
            [row("", i=i) for i in range(5)] + rows(0, 2),
            "0 training and 2 held-out rows; SFT needs both; 5 left out: empty",
        ),
        ([row("long " * 99, i=i) for i in range(5)] + rows(0, 2), "5 left out: long"),
    ],
)
def test_what_cannot_be_learnt_from_is_said(table: list[dict], why: str, chain: Path, tmp_path: Path) -> None:
    with pytest.raises(ForjaError, match=why):
        stage(chain, tmp_path, table)


@pytest.mark.parametrize("packing", ["padded", "bestfit"])
def test_one_row_and_questions_beyond_the_context(packing: str, chain: Path, tmp_path: Path) -> None:
    _, one = stage(chain, tmp_path / "one", rows(1, 1), packing=packing, steps=4)
    long = [row("yes", "word " * 99, i, split) for i, split in enumerate(["train"] * 3 + ["val"] * 2)]
    _, cut = stage(chain, tmp_path / "cut", long, packing=packing, steps=4)
    assert one["rows"] == 1.0 and cut["rows"] == 3.0 and cut["dropped"] == 0.0
    with pytest.raises(ForjaError, match="3 left out: long"):
        stage(chain, tmp_path / "dropped", long, packing=packing, long="drop")


def test_packing_is_another_way_of_laying_out_the_same_batch(
    chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Micro-batches and packing cut the batch otherwise; the weights that come out are the same within rounding."""
    found = []
    for micro in ("4", "2", "1"):
        monkeypatch.setenv("FORJA_MICRO_BATCH", micro)
        found.append(stage(chain, tmp_path / micro, rows(20, 3), packing="bestfit", replay=1, keep="last")[0])
    for other in found[1:]:
        for (name, p), q in zip(found[0].named_parameters(), other.parameters(), strict=True):
            if not name.endswith("qkv.bias"):  # the true gradient of keys' biases is nothing, and AdamW divides by it
                torch.testing.assert_close(p, q, atol=2e-4, rtol=0)


def test_replayed_windows_are_the_pretraining_text(chain: Path, tmp_path: Path) -> None:
    shard = chain / "tokenize" / "train.npy"
    found = replayed(shard, 64, seed=3, step=5, count=2)
    for (ids, said), window in zip(found, windows(shard, 64, 3, 5, 2), strict=True):
        assert ids == window.tolist() and said == [False] + [True] * 64
    assert replayed(shard, 64, 3, 5, 0) == []
    table = rows(16, 3)
    kept = {}
    for replay in (0, 3):
        how = {"replay": replay, "steps": 60, "lr": 3e-3, "eval_every": 60, "keep": "last"}
        _, kept[replay] = stage(chain, tmp_path / str(replay), table, **how)
    before = {m["text_bits_per_byte_before"] for m in kept.values()}
    assert len(before) == 1 and kept[3]["text_bits_per_byte"] < 0.8 * min(before)
    assert kept[3]["text_bits_per_byte"] < kept[0]["text_bits_per_byte"]
    with pytest.raises(ValidationError, match="replay 4 has to leave room"):
        sft.Config.model_validate(CFG.model_dump() | {"replay": 4})


def test_remembering_is_measured_by_the_bytes_of_the_text(chain: Path) -> None:
    model = load(chain / "pretrain", "cpu").model
    tokenizer = Tokenizer.from_file(str(chain / "tokenize" / "tokenizer.json"))
    separator = special(tokenizer, SEPARATOR)
    tokens = [separator, *np.load(chain / "tokenize" / "val.npy").tolist()]
    nats = 0.0
    for at in range(1, len(tokens)):  # 64 tokens at first, then windows of 64 that begin half-way back
        first = 1 + (at - 1) // 63 * 63 if at < 64 else 64 + (at - 64) // 32 * 32
        start = 0 if at < 64 else first - 32
        logits = model(torch.tensor([tokens[start:at]])).detach()[0, -1]
        nats -= float(logits.log_softmax(-1)[tokens[at]])
    documents = [r for r in map(json.loads, (chain / "validate" / "corpus.jsonl").open()) if r["split"] == "val"]
    n_bytes = sum(len(r["text"].encode()) for r in documents)
    assert remembered(model, chain / "tokenize", tokenizer) == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-4)


def test_adapters_alone_move_and_are_merged(chain: Path, tmp_path: Path) -> None:
    lora = {"lora": {"rank": 4, "alpha": 8.0}, "lr": 1e-2, "steps": 40, "eval_every": 20}
    model, metrics = stage(chain, tmp_path, rows(16, 3), **lora)
    start = load(chain / "pretrain", "cpu").model
    assert metrics["val_loss"] < metrics["val_loss_before"] - 0.1
    for (name, p), q in zip(start.named_parameters(), model.named_parameters(), strict=True):
        assert name == q[0]
        rank = torch.linalg.matrix_rank(q[1] - p, rtol=1e-3) if p.dim() > 1 else int((q[1] != p).any())
        assert rank == (4 if name.startswith("blocks.") and p.dim() > 1 else 0), name
    with pytest.raises(ValidationError, match="lora needs matrix_lr null"):
        sft.Config.model_validate(CFG.model_dump() | lora | {"matrix_lr": 0.02})


def test_adapters_go_on_to_the_same_bytes(chain: Path, tmp_path: Path) -> None:
    """Stopped at step 5 of 7, after a save at 4: adapters, their moments and the best step's copy are all in it."""
    how = {"lora": {"rank": 4, "alpha": 8.0}, "lr": 1e-2, "steps": 7, "eval_every": 3}
    stage(chain, tmp_path / "whole", rows(16, 3), **how)

    def stop_at_5(row: Metrics, step: int) -> None:
        if step == 5:
            raise KeyboardInterrupt

    (tmp_path / "cut" / "scratch").mkdir(parents=True)
    cfg = sft.Config.model_validate(CFG.model_dump() | how)
    folders = (chain / "tokenize", chain / "pretrain", tmp_path / "cut" / "out", tmp_path / "cut" / "scratch")
    with pytest.raises(KeyboardInterrupt):
        sft.run(cfg, tmp_path / "whole" / "validate", *folders, stop_at_5)
    steps: list[int] = []
    sft.run(cfg, tmp_path / "whole" / "validate", *folders, lambda row, step: steps.append(step))
    assert steps == [5, 6, 7]
    weights = [(tmp_path / name / "out" / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]


def test_adapters_are_read_by_whoever_reads_the_weight() -> None:
    """The training kernels, the generator's and the merged model's; and without them the model is the one before."""
    model, ids = gpt(), torch.randint(4, 300, (2, 20))
    before, said = model(ids).detach(), generate(model, [[5, 6, 7]], max_new_tokens=8, stop=-1)
    adapt(model, Lora(rank=2, alpha=4.0))
    torch.testing.assert_close(model(ids).detach(), before, atol=0, rtol=0)
    by_hand = {}
    for name, module in model.named_modules():
        if isinstance(module, LowRank):
            torch.nn.init.normal_(module.b, std=0.2)
            owner = name.removesuffix(".parametrizations.weight.0")
            original = model.get_submodule(f"{owner}.parametrizations.weight").original
            by_hand[f"{owner}.weight"] = (original + 2.0 * module.b @ module.a).detach().clone()
    assert len(by_hand) == 4 * SHAPE["layers"]
    adapted, spoken = model(ids).detach(), generate(model, [[5, 6, 7]], max_new_tokens=8, stop=-1)
    assert float((adapted - before).abs().max()) > 0.01 and spoken != said
    with without(model):
        assert torch.equal(model(ids).detach(), before)
        assert generate(model, [[5, 6, 7]], max_new_tokens=8, stop=-1) == said
    assert torch.equal(model(ids).detach(), adapted)
    merge(model)
    assert torch.equal(model(ids).detach(), adapted)
    for name, weight in by_hand.items():
        torch.testing.assert_close(model.state_dict()[name], weight)
    assert all(p.requires_grad for p in model.parameters()) and model.state_dict().keys() == gpt().state_dict().keys()


def test_the_same_batches_whatever_the_context_of_the_question(tokenizer: Tokenizer) -> None:
    """A conversation that was cut ends as the whole one does: the answer is learnt in full."""
    talk = {**row("the answer"), "messages": [asks("one two three " * 9), says("the answer")]}
    whole, said = encode(tokenizer, talk["messages"], PROMPTS["en"])
    ((cut, cut_said),), _ = examples(tokenizer, [talk], PROMPTS, 48, "cut")
    assert cut[-30:] == whole[-30:] and cut_said[-30:] == said[-30:] and len(cut) == 48 < len(whole)
