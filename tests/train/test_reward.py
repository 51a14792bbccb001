"""The reward model against loops that take one answer at a time, and on rows that are hardly rows."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from pydantic import ValidationError
from safetensors.torch import load_file
from tokenizers import Tokenizer

sys.path.append(str(Path(__file__).parent))
from test_resume import CONFIGS, PROMPTS, SHAPE

from components.artifact import ForjaError
from components.data.chat import END, SEPARATOR, encode, encode_prompt, special
from components.data.tokenize import train_bpe
from components.log import silent
from components.model.checkpoint import load, save
from components.model.gpt import GPT, GPTConfig
from components.train import referee, reward
from components.train.reward import (
    Pair,
    Single,
    dialogues,
    item_loss,
    items_of,
    last_values,
    leads,
    normalise,
    score,
    with_scalar_head,
)

CFG = CONFIGS[reward].model_copy(
    update={"share": 1.0, "precision": "fp32", "matrix_lr": None, "steps": 4, "eval_every": 2}
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["some text"], 300, 1)


@pytest.fixture
def policy() -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(**SHAPE, vocab_size=300, head="lm")).eval()


@pytest.fixture
def judge(policy: GPT) -> GPT:
    model = with_scalar_head(policy).eval()
    torch.nn.init.normal_(model.head.weight)
    return model


def says(text: str) -> dict:
    return {"role": "assistant", "content": text}


def row(
    i: int, chosen: str | None, rejected: str | None, ask: str = "say", split: str = "train", **more: object
) -> dict:
    said = {"chosen": chosen and says(chosen) if chosen != "" else says(""), "rejected": rejected}
    said["rejected"] = None if rejected is None else says(rejected)
    asked = [{"role": "user", "content": ask}]
    kept = {key: value for key, value in said.items() if value is not None}
    return {"id": str(i), "object": str(i), "lang": "en", "split": split, "messages": asked, **kept, **more}


def test_values_are_read_at_the_last_token(judge: GPT) -> None:
    sequences = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
    want = [float(judge(torch.tensor([s]))[0, -1].detach()) for s in sequences]
    assert last_values(judge, sequences, 0).tolist() == pytest.approx(want, abs=1e-5)
    assert score(judge, sequences, 0, batch_tokens=4).tolist() == pytest.approx(want, abs=1e-5)


def test_the_loss_of_pairs_and_single_answers(judge: GPT) -> None:
    """Bradley-Terry with a margin, and the logistic loss on the score alone, each by hand."""
    ids = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [14], [15, 16]]
    a, b, c, good, bad = (float(judge(torch.tensor([s]))[0, -1].detach()) for s in ids)
    items = [Single(ids[3], True, 0), Pair(ids[0], ids[1], 0.0, 1)]
    items += [Single(ids[4], False, 1), Pair(ids[2], ids[0], 0.7, 1)]
    want = sum(math.log1p(math.exp(-x)) for x in (a - b, c - a - 0.7, good, -bad))
    loss, others = item_loss(judge, items, 0)
    assert float(loss.detach()) == pytest.approx(want, abs=1e-5)
    assert int(others["accuracy"]) == (a > b) + (c > a) + (good > 0) + (bad < 0)
    assert leads(judge, items, 0) == pytest.approx([good, a - b, -bad, c - a], abs=1e-5)
    for kinds in (items[:1], items[1:2]):
        assert math.isfinite(float(item_loss(judge, kinds, 0)[0].detach()))


def test_answers_that_change_places_are_judged_alike(judge: GPT) -> None:
    items = [Pair(list(range(5, 5 + n)), list(range(40, 42 + n // 2)), 0.0, 1) for n in range(2, 30)]
    items += [Pair(item.rejected, item.chosen, 0.0, 1) for item in items]
    found, swapped = leads(judge, items, 0), leads(judge, items, 0, swapped=True)
    assert found == pytest.approx(swapped, abs=1e-5)
    half = len(items) // 2
    assert found[:half] == pytest.approx([-x for x in found[half:]], abs=1e-5)
    assert len(set(found)) == len(items)


def test_a_new_head_prefers_nothing(policy: GPT) -> None:
    judge = with_scalar_head(policy)
    assert last_values(judge, [[5, 6], [7]], 0).tolist() == [0.0, 0.0]
    assert torch.equal(judge.wte.weight, policy.wte.weight)


def test_rows_become_items(tokenizer: Tokenizer) -> None:
    table = [
        row(0, "a", "b"),
        row(1, "a", "a"),
        row(2, "a", "b", margin=0.5),
        row(3, "a", None),
        row(4, None, "b"),
        row(5, "a", ""),
        row(6, "a", "b", ask="long " * 40),
        row(7, "long " * 40, "b"),
    ]
    items, dropped = items_of(tokenizer, table, PROMPTS, 40, margin=0.1)
    assert dropped == {"equal": 1, "long": 2}
    assert [type(item) for item in items] == [Pair, Pair, Single, Single, Pair]
    assert [item.margin for item in items if isinstance(item, Pair)] == [0.1, 0.5, 0.1]
    assert [item.good for item in items if isinstance(item, Single)] == [True, False]
    assert items[2][0] == items[0][0] and items[3][0] == items[0][1]
    asked = encode_prompt(tokenizer, table[0]["messages"], PROMPTS["en"])
    assert all(item.asked == len(asked) and item[0][: item.asked] == asked for item in items)
    assert items[4][1][-1] == special(tokenizer, END) and len(items[4][1]) < len(items[4][0])
    with pytest.raises(ForjaError, match="row 8 is in 'fr'"):
        items_of(tokenizer, [row(8, "a", "b") | {"lang": "fr"}], PROMPTS, 40)


def test_a_pair_that_is_too_long_is_cut_alike(tokenizer: Tokenizer) -> None:
    template = PROMPTS["en"]
    asked = [{"role": "user", "content": "one"}, says("two"), {"role": "user", "content": "three four five six seven"}]
    whole = dialogues(tokenizer, asked, [says("a"), says("a longer answer")], template, 500, "cut")
    last = dialogues(tokenizer, asked[2:], [says("a"), says("a longer answer")], template, 500, "cut")
    assert whole is not None and last is not None
    longest = encode(tokenizer, [*asked, says("a longer answer")], template)[0]
    assert whole[1][1] == longest
    assert [before for before, _ in (whole, last)] == [
        len(encode_prompt(tokenizer, some, template)) for some in (asked, asked[2:])
    ]
    again = dialogues(tokenizer, asked, [says("a"), says("a longer answer")], template, len(longest) - 1, "cut")
    assert again == last
    cut = dialogues(tokenizer, asked, [says("a"), says("a longer answer")], template, len(last[1][1]) - 3, "cut")
    assert cut is not None and [len(s) for s in cut[1]] == [len(s) - 3 for s in last[1]]
    assert cut[0] == last[0] - 3
    head = len(encode(tokenizer, [{"role": "user", "content": ""}], template)[0]) - 1
    for ours, theirs in zip(cut[1], last[1], strict=True):
        assert ours[:head] == theirs[:head] and ours[head:] == theirs[head + 3 :]
    assert dialogues(tokenizer, asked, [says("a"), says("long " * 99)], template, 60, "cut") is None
    assert dialogues(tokenizer, asked, [says("a")], template, 20, "drop") is None


def test_the_score_stands_at_the_token_that_ends_the_answer(tokenizer: Tokenizer) -> None:
    """PPO's answers end there; what a template writes behind it is not read."""
    template = {"user": "{content}", "assistant": ":", "answer": f"{{content}}{END}\n"}
    found = dialogues(tokenizer, [{"role": "user", "content": "x"}], [says("y")], template, 50, "drop")
    assert found is not None and found[1][0][-1] == special(tokenizer, END)


def test_scores_have_mean_0_and_deviation_1(judge: GPT, policy: GPT) -> None:
    heldout = [Pair(list(range(5, 7 + n)), list(range(60, 70 - n)), 0.0, 1) for n in range(6)]
    heldout += [Single([9, 8], True, 1)]
    sequences = [s for item in heldout[:-1] for s in item[:2]] + [[9, 8]]
    before = score(judge, sequences, 0)
    deviation = normalise(judge, heldout, 0)
    after = score(judge, sequences, 0)
    assert deviation == pytest.approx(float(before.std()), rel=1e-5)
    assert float(after.mean()) == pytest.approx(0, abs=1e-5) and float(after.std()) == pytest.approx(1, abs=1e-4)
    torch.testing.assert_close(after * deviation + before.mean(), before, atol=1e-5, rtol=0)
    flat = with_scalar_head(policy)  # scores that do not differ are not blown up
    assert normalise(flat, heldout, 0) == 0.0 and score(flat, sequences, 0).tolist() == [0.0] * len(sequences)


def stage(
    tmp_path: Path,
    policy: GPT,
    tokenizer: Tokenizer,
    table: list[dict],
    module: ModuleType = reward,
    **changes: object,
) -> dict[str, float]:
    """The stage on these rows; its weights are finite, whatever they are."""
    for name in ("validate", "out", "scratch"):
        (tmp_path / name).mkdir()
    tokenizer.save(str(tmp_path / "t.json"))
    save(policy, tmp_path / "sft", tmp_path / "t.json", PROMPTS)
    text = "".join(json.dumps(r) + "\n" for r in table)
    (tmp_path / "validate" / "preferences.jsonl").write_text(text)
    cfg = CFG.model_copy(update=changes)
    metrics = module.run(cfg, tmp_path / "validate", tmp_path / "sft", tmp_path / "out", tmp_path / "scratch", silent)
    assert all(torch.isfinite(w).all() for w in load_file(tmp_path / "out" / "model.safetensors").values())
    assert all(math.isfinite(value) for value in metrics.values())
    return metrics


def table(kind: Callable[[int], dict], train: int, val: int) -> list[dict]:
    return [kind(i) for i in range(train)] + [kind(train + i) | {"split": "val"} for i in range(val)]


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ([], "0 training and 0 held-out rows"),
        (table(lambda i: row(i, "a", "b"), 1, 0), "1 training and 0 held-out rows"),
        (table(lambda i: row(i, "a", "b"), 0, 5), "0 training and 4 held-out rows"),
        (table(lambda i: row(i, "same", "same"), 9, 3), "0 training and 0 held-out rows.*9 left out: equal"),
        (table(lambda i: row(i, "word " * 99, "b"), 4, 3), "4 left out: long"),
        (table(lambda i: row(i, f"{i}", None), 6, 3), "every judged answer is good"),
        (table(lambda i: row(i, None, f"{i}"), 6, 3), "every judged answer is bad"),
        (table(lambda i: row(i, "", ""), 6, 3), "6 left out: equal"),
        (table(lambda i: row(i, "a", "b", margin="2"), 6, 3), "row 0 has the margin '2'; make it a number"),
    ],
)
def test_what_cannot_be_learnt_from_is_said(
    rows: list[dict], why: str, tmp_path: Path, policy: GPT, tokenizer: Tokenizer
) -> None:
    with pytest.raises(ForjaError, match=why):
        stage(tmp_path, policy, tokenizer, rows)


@pytest.mark.parametrize(
    "rows",
    [
        table(lambda i: row(i, "a", "b"), 1, 2),
        table(lambda i: row(i, "", "b") if i % 2 else row(i, "a", ""), 5, 4),
        table(lambda i: row(i, "a", "b", ask=f"{i} " * 90), 5, 4),
        table(lambda i: row(i, "good", None) if i % 2 else row(i, None, "bad"), 6, 4),
        table(lambda i: row(i, "a", "b") if i % 2 else row(i, None, "bad"), 6, 4),
        table(lambda i: row(i, "good", None) if i % 2 or i > 5 else row(i, None, "bad"), 6, 4),
    ],
    ids=["one pair", "empty answers", "long questions", "labels", "pairs and labels", "one class held out"],
)
def test_what_can_be_learnt_from_is_learnt(rows: list[dict], tmp_path: Path, policy: GPT, tokenizer: Tokenizer) -> None:
    metrics = stage(tmp_path, policy, tokenizer, rows, steps=30, eval_every=10, lr=0.01)
    assert metrics["val_loss"] < math.log(2)
    assert metrics["val_accuracy.low"] <= metrics["val_accuracy"] <= metrics["val_accuracy.high"]
    curve = json.loads((tmp_path / "out" / "calibration.json").read_text())
    assert sum(point["n"] for point in curve) == metrics["val_accuracy.n"]


def test_scores_that_do_not_differ_harm_nothing(tmp_path: Path, policy: GPT, tokenizer: Tokenizer) -> None:
    """Every pair with its answers the other way round too: there is nothing to learn."""
    rows = [row(i, *(("a", "b") if i % 2 else ("b", "a"))) for i in range(8)]
    rows += [row(8 + i, *(("a", "b") if i % 2 else ("b", "a")), split="val") for i in range(4)]
    metrics = stage(tmp_path, policy, tokenizer, rows, steps=10, batch=16)
    assert metrics["val_accuracy"] == 0.5 and metrics["val_loss"] >= math.log(2)


def test_the_best_step_is_kept(tmp_path: Path, policy: GPT, tokenizer: Tokenizer) -> None:
    """Held-out labels are the other way round, so every step makes it worse: the first measured one is kept."""
    rows = [row(i, "a", "b") for i in range(8)] + [row(8 + i, "b", "a", split="val") for i in range(4)]
    found = {}
    for keep in ("best", "last"):
        (tmp_path / keep).mkdir()
        metrics = stage(tmp_path / keep, policy, tokenizer, rows, keep=keep, steps=6, eval_every=1, lr=0.01, warmup=0)
        found[keep] = metrics["val_loss"]
        assert metrics.get("best_step", 6.0) == (1.0 if keep == "best" else 6.0)
    assert math.log(2) < found["best"] < found["last"]
    with pytest.raises(ValidationError, match="ema keeps an average of all steps"):
        reward.Config.model_validate({**CFG.model_dump(), "ema": 0.9})


def test_a_checkpoint_scores_as_it_did(tmp_path: Path, policy: GPT, tokenizer: Tokenizer) -> None:
    metrics = stage(tmp_path, policy, tokenizer, table(lambda i: row(i, f"{i}", "b"), 6, 4), steps=5, lr=0.01)
    model, cut, prompts = load(tmp_path / "out", "cpu")
    assert prompts == PROMPTS and model.config.head == "scalar"
    rows = [row(i, f"{i}", "b") for i in range(6, 10)]
    sequences = [s for item in items_of(cut, rows, prompts, 64)[0] for s in item[:2]]
    values = score(model, sequences, special(cut, SEPARATOR))
    assert float(values.mean()) == pytest.approx(0, abs=1e-4) and float(values.std()) == pytest.approx(1, abs=1e-3)
    pairs = (values[::2] > values[1::2]).float().mean()
    assert float(pairs) == metrics["val_accuracy"] and metrics["val_swapped_agreement"] == 1.0


def test_neither_reward_model_learns_from_the_others_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """What each one reads of a table with several rows an object: all rows between them, none twice, objects whole."""
    table = [row(i, f"{i}", "b", split=("train", "train", "val")[i % 3]) | {"object": str(i // 4)} for i in range(600)]
    taken: dict[str, set[int]] = {}
    for stage, share in ((reward, 0.7), (referee, 0.3)):
        cfg = stage.Config.model_validate(CFG.model_dump() | {"share": share})
        mine: list[Callable] = []
        monkeypatch.setattr(reward, "learn", lambda cfg, which, *_, mine=mine: mine.append(which))
        stage.run(cfg, *[Path()] * 4, silent)
        taken[stage.__name__] = {i for i, r in enumerate(table) if r["split"] == "train" and mine[0](r)}
    first, second = taken.values()
    assert not first & second and len(first | second) == 400
    assert 230 < len(first) < 330
    assert not {i // 4 for i in first} & {i // 4 for i in second}


def test_the_referee_is_a_reward_model_of_its_own_rows(tmp_path: Path, policy: GPT, tokenizer: Tokenizer) -> None:
    """Among the reward model's objects x is better, among the referee's y: each learns its own, held-out rows alike."""
    objects = [str(i) for i in range(60)]
    mine = [reward.place({"object": o}) < 0.5 for o in objects]
    rows = [
        row(i, *("xy" if own else "yx")) | {"object": o} for i, (o, own) in enumerate(zip(objects, mine, strict=True))
    ]
    rows += [row(60 + i, "x", "y", split="val") for i in range(4)]
    found = {}
    for module in (reward, referee):
        (tmp_path / module.__name__).mkdir()
        changes = {"steps": 40, "eval_every": 20, "lr": 0.01, "keep": "last", "share": 0.5}
        found[module] = stage(tmp_path / module.__name__, policy, tokenizer, rows, module, **changes)
    assert found[reward]["val_accuracy"] == 1.0 and found[referee]["val_accuracy"] == 0.0
    assert found[reward]["rows"] == sum(mine) and found[referee]["rows"] == 60 - sum(mine)


def test_the_demos_recipe_is_whole() -> None:
    section = yaml.safe_load(Path("conf/demo.yaml").read_text())["reward"]
    assert reward.Config.model_validate(section | {"seed": 1}).keep == "best"
