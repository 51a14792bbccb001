import os
from pathlib import Path

import pytest
from toy import ROOT

from components.artifact import ForjaError
from pipelines.recipe import compose, use

DEMO = """
seed: 7
ingest: {lr: 0.1, steps: "${seed}"}
validate: {lr: 0.1, steps: 1}
tokenize: {lr: 0.1, steps: 1}
pretrain: {lr: 0.1, steps: 1}
sft: {lr: 0.1, steps: 1}
reward: {lr: 0.1, steps: 1}
referee: {lr: 0.1, steps: 1}
ppo: {lr: 0.1, steps: 1}
quantize: {lr: 0.1, steps: 1}
evaluate: {lr: 0.1, steps: 1}
executor: {kind: local, workers: null, partition: null, minutes: 60, memory_gb: 2}
promote: {name: forja, alias: champion}
"""


@pytest.fixture
def conf(tmp_path: Path, fake: object) -> Path:
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "demo.yaml").write_text(DEMO)
    return tmp_path


def error(root: Path, *sets: str, recipe: str = "conf/demo.yaml") -> str:
    with pytest.raises(ForjaError) as e:
        compose(root, Path(recipe), list(sets))
    return str(e.value)


def test_interpolation_and_order(conf: Path) -> None:
    params = compose(conf, Path("conf/demo.yaml"), [])
    assert params["ingest"]["steps"] == 7
    assert list(params)[:4] == ["recipe", "seed", "ingest", "validate"]
    assert list(params)[-1] == "promote"


def test_a_base_gives_what_a_recipe_does_not_say(conf: Path) -> None:
    (conf / "conf" / "more.yaml").write_text("base: demo.yaml\nsft: {steps: 9}\n")
    params = compose(conf, Path("conf/more.yaml"), [])
    assert params["recipe"] == "more"
    assert params["sft"] == {"lr": 0.1, "steps": 9}
    assert params["ppo"] == {"lr": 0.1, "steps": 1}


def test_set_reaches_what_interpolates(conf: Path) -> None:
    params = compose(conf, Path("conf/demo.yaml"), ["sft.lr=1e-4", "seed=3"])
    assert params["sft"]["lr"] == 1e-4
    assert params["ingest"]["steps"] == 3


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        ("sft.lrr=1", ["sft.lrr", "unknown key", "did you mean sft.lr?"]),
        ("sft.lr", ["sft.lr", "--set section.key=value"]),
        ("sft.lr=fast", ["conf/demo.yaml", "sft.lr", "valid number", "'fast'"]),
        ("sft.lr=[1", ["--set sft.lr=[1"]),
        ("sft.lr=${sed}", ["sft.lr", "sed"]),
        ("promote=1", ["promote"]),
        ("executor.kind=slurm", ["executor", "slurm wants a partition"]),
    ],
)
def test_a_wrong_set_is_one_clear_line(conf: Path, sets: str, words: list[str]) -> None:
    said = error(conf, sets)
    assert all(word in said for word in words), said
    assert len(said.splitlines()) == 1


def test_every_wrong_key_is_named(conf: Path) -> None:
    (conf / "conf" / "bad.yaml").write_text("base: demo.yaml\nsft: {lrr: 1}\npretrian: {}\nppo: {steps: null}\n")
    said = error(conf, recipe="conf/bad.yaml").splitlines()
    assert any("pretrian: unknown key; did you mean pretrain?" in line for line in said)
    assert any("sft.lrr: unknown key; did you mean sft.lr?" in line for line in said)
    assert any("ppo.steps: missing" in line for line in said)
    assert len(said) == 3


def test_a_referee_that_would_share_rows_is_refused() -> None:
    demo = Path("conf/demo.yaml")
    assert compose(ROOT, demo, ["reward.share=0.9", "referee.share=0.1"])["referee"]["share"] == 0.1
    assert compose(ROOT, demo, ["reward.share=1", "referee.share=0"])["reward"]["share"] == 1
    assert "referee.share: with reward.share over 1" in error(ROOT, "referee.share=0.35")


def test_a_missing_recipe_names_the_nearest(conf: Path) -> None:
    assert "did you mean conf/demo.yaml?" in error(conf, recipe="conf/dmo.yaml")


def test_a_circle_of_bases_ends(conf: Path) -> None:
    (conf / "conf" / "a.yaml").write_text("base: b.yaml\n")
    (conf / "conf" / "b.yaml").write_text("base: a.yaml\n")
    assert "comes back to itself" in error(conf, recipe="conf/a.yaml")


@pytest.mark.parametrize("text", ["[1, 2]", "a: [1", "just words"])
def test_a_recipe_that_is_no_mapping(conf: Path, text: str) -> None:
    (conf / "conf" / "bad.yaml").write_text(text)
    assert "bad.yaml" in error(conf, recipe="conf/bad.yaml")


def test_params_yaml_is_untouched_when_it_says_so_already(conf: Path) -> None:
    use(conf, Path("conf/demo.yaml"), [])
    os.utime(conf / "params.yaml", (1, 1))
    use(conf, Path("conf/demo.yaml"), [])
    assert (conf / "params.yaml").stat().st_mtime == 1
    use(conf, Path("conf/demo.yaml"), ["sft.steps=2"])
    assert (conf / "params.yaml").stat().st_mtime != 1


@pytest.mark.parametrize("path", sorted((ROOT / "conf").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_recipes_of_this_checkout_are_whole(path: Path) -> None:
    params = compose(ROOT, path, [])
    assert isinstance(params["pretrain"]["model"], dict)
    assert params["sft"]["prompts"] and all(set(p) == {"user", "assistant"} for p in params["sft"]["prompts"].values())
    for section in ("prompts", "model"):
        with pytest.raises(ForjaError, match=f"no conf/{section}s?/nowhere.yaml"):
            stage = "sft" if section == "prompts" else "pretrain"
            compose(ROOT, path, [f"{stage}.{section}={'[nowhere]' if section == 'prompts' else 'nowhere'}"])


def test_prompts_by_language_or_by_name() -> None:
    """A name is a language and its file; {language: file} where the two differ."""
    demo = compose(ROOT, Path("conf/demo.yaml"), [])["sft"]["prompts"]
    assert sorted(demo) == ["en", "es"] and demo["es"]["assistant"] == "Respuesta:"
    named = compose(ROOT, Path("conf/demo.yaml"), ["sft.prompts=[{en: chatml}, es]"])["sft"]["prompts"]
    assert named["es"] == demo["es"] and named["en"]["assistant"] == "<|im_start|>assistant\n"
    assert (
        error(ROOT, "sft.prompts=[{en: chatmal}]")
        == "sft.prompts: no conf/prompts/chatmal.yaml; one of chatml, en, es, own"
    )
