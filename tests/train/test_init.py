"""Starting from someone else's model: its tokenizer cuts the corpus, and its weights are where a recipe begins."""

import json
import sys
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

sys.path.append(str(Path(__file__).parents[1] / "model"))
from foreign import CONFIGS, random_model, saved
from foreign import tokenizer as foreign_tokenizer
from test_resume import CONFIGS as RECIPES
from test_resume import SHAPE, write_tables

from components.artifact import ForjaError
from components.data import tokenize
from components.data.chat import SPECIAL, encode_text, special
from components.data.templates import stop
from components.log import silent
from components.model.checkpoint import load, save, shapes_of
from components.model.gpt import GPT, GPTConfig
from components.model.interop import grown, import_model
from components.train import pretrain, sft


def config(**changes: object) -> pretrain.Config:
    """test_resume's recipe, in float32, but from a source."""
    plain = {**RECIPES[pretrain].model_dump(), "matrix_lr": None, "precision": "fp32", "model": None, "init": "x"}
    return pretrain.Config(**{**plain, **changes})


def chain(root: Path, source: Path, **changes: object) -> tuple[Path, dict[str, float]]:
    """tokenize and pretrain, both from `source`."""
    for name in ("validate", "tokenize", "pretrain", "scratch"):
        (root / name).mkdir()
    write_tables(root / "validate")
    cut = tokenize.Config(vocab_size=None, min_frequency=None, sample_mb=9, tokenizer="x")
    tokenize.run(cut, root / "validate", root / "tokenize", silent, tokenizer=source)
    out = root / "pretrain"
    return out, pretrain.run(config(**changes), root / "tokenize", out, root / "scratch", silent, init=source)


@pytest.mark.parametrize("name", ["llama", "llama-tied-wide", "gpt2", "qwen3"])
@torch.no_grad()
def test_zero_steps_are_the_imported_model(name: str, tmp_path: Path) -> None:
    theirs = random_model(CONFIGS[name])
    out, metrics = chain(tmp_path, saved(theirs, tmp_path / "theirs"), steps=0, context=48)
    ours, cut, _ = load(out, "cpu")
    old = foreign_tokenizer()
    n = old.get_vocab_size()
    ids = torch.randint(0, n, (2, 30))
    torch.testing.assert_close(ours(ids)[..., :n], theirs(ids).logits[..., :n], atol=1e-4, rtol=0)
    assert metrics["val_loss"] > 0 and metrics["epochs"] == 0

    # The four tokens stand behind the old vocabulary, with the mean of its rows.
    assert [special(cut, name) for name in SPECIAL] == [n, n + 1, n + 2, n + 3]
    mean = theirs.get_input_embeddings().weight[:n].mean(0)
    torch.testing.assert_close(ours.wte.weight[n : n + 4], mean.expand(4, -1))
    torch.testing.assert_close(ours.head.weight[n], theirs.get_output_embeddings().weight[:n].mean(0))
    text = "Doc <|endoftext|><|end|></s><s> again"
    assert encode_text(cut, text) == encode_text(old, text)
    assert cut.decode(encode_text(cut, text)) == text


def test_three_steps_learn(tmp_path: Path) -> None:
    source = saved(random_model(CONFIGS["llama"]), tmp_path / "theirs")
    for steps in (0, 3):
        (tmp_path / str(steps)).mkdir()
    _, before = chain(tmp_path / "0", source, steps=0, context=48)
    out, after = chain(tmp_path / "3", source, steps=3, context=48, lr=1e-2)
    assert after["val_loss"] < before["val_loss"]
    assert load(out, "cpu").model.config.context == 64  # a shorter window does not change the shape


def test_a_checkpoint_of_ours_is_a_start_too(tmp_path: Path) -> None:
    import_model(saved(random_model(CONFIGS["qwen2"]), tmp_path / "theirs"), tmp_path / "imported")
    (tmp_path / "a").mkdir()
    first, _ = chain(tmp_path / "a", tmp_path / "imported", steps=0, context=48)
    (tmp_path / "b").mkdir()
    second, _ = chain(tmp_path / "b", first, steps=0, context=48)
    for file in ("model.safetensors", "model.json", "tokenizer.json"):
        assert (first / file).read_bytes() == (second / file).read_bytes()


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    source = saved(random_model(CONFIGS["llama"]), tmp_path / "theirs")
    (tmp_path / "a").mkdir()
    chain(tmp_path / "a", source, steps=0, context=48)
    other = json.loads((source / "tokenizer.json").read_text())
    other["model"]["merges"] = other["model"]["merges"][:-1]
    (source / "tokenizer.json").write_text(json.dumps(other))
    with pytest.raises(ForjaError, match="its tokenizer is not the one that cut the corpus"):
        pretrain.run(config(steps=0), tmp_path / "a" / "tokenize", tmp_path, tmp_path, silent, init=source)


def test_a_window_longer_than_the_model_sees_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ForjaError, match=r"pretrain.context: 65, and the model sees 64"):
        chain(tmp_path, saved(random_model(CONFIGS["llama"]), tmp_path / "theirs"), steps=0, context=65)


def test_a_reward_model_is_no_start(tmp_path: Path) -> None:
    foreign_tokenizer().save(str(tmp_path / "t.json"))
    save(GPT(GPTConfig(**SHAPE, vocab_size=300, head="scalar")), tmp_path / "judge", tmp_path / "t.json")
    with pytest.raises(ForjaError, match="judge: has a head of one value"):
        chain(tmp_path, tmp_path / "judge", steps=0, context=48)


@pytest.mark.parametrize("change", [{"init": None}, {"model": SHAPE}])
def test_a_model_and_a_start_exclude_each_other(change: dict) -> None:
    with pytest.raises(ValidationError, match="exactly one of the two is null"):
        config(**change)


def test_rows_that_a_padded_vocabulary_has_already_are_set(tmp_path: Path) -> None:
    """A vocabulary padded to a round number: new tokens take padding rows, whatever stood there."""
    shape = GPTConfig(**{**SHAPE, "tied": False}, vocab_size=10, head="lm")
    state = {name: torch.randn(size) for name, size in shapes_of(shape).items()}
    want = {name: state[name][:7].mean(0) for name in ("wte.weight", "head.weight")}
    kept = {name: state[name][:7].clone() for name in want}
    model = grown(shape, dict(state), list(range(7)), [7, 8, 11])
    assert model.config.vocab_size == 12
    for name, mean in want.items():
        rows = model.state_dict()[name]
        torch.testing.assert_close(rows[:7], kept[name])
        torch.testing.assert_close(rows[9], state[name][9])
        for i in (7, 8, 10, 11):
            torch.testing.assert_close(rows[i], mean)


def test_sft_may_use_the_template_that_came_with_the_model(tmp_path: Path) -> None:
    source = saved(random_model(CONFIGS["llama"]), tmp_path / "theirs")
    text = "{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"
    (source / "chat_template.jinja").write_text(text)
    out, _ = chain(tmp_path, source, steps=0, context=48)
    cfg = RECIPES[sft].model_copy(update={"prompts": {"en": {"jinja": "own"}}, "steps": 1})
    (tmp_path / "sft").mkdir()
    sft.run(cfg, tmp_path / "validate", tmp_path / "tokenize", out, tmp_path / "sft", tmp_path / "scratch", silent)
    _, cut, prompts = load(tmp_path / "sft", "cpu")
    assert prompts == {"en": {"jinja": text, "bos_token": "<s>", "eos_token": "</s>"}}
    assert stop(cut, prompts) == cut.token_to_id("</s>")
    (out / "template.json").unlink()
    with pytest.raises(ForjaError, match=r"sft\.prompts: own, and no chat template came with"):
        sft.run(cfg, tmp_path / "validate", tmp_path / "tokenize", out, tmp_path / "sft", tmp_path / "scratch", silent)
