"""dvc.yaml is the only declaration of the graph; the stages' own signatures must say the same."""

import importlib
import inspect
from pathlib import Path

import pytest
import yaml
from toy import ROOT, params, seal, section

from pipelines import dvc, identity

OUTSIDE = {
    "validate": ["decontaminate"],
    "tokenize": ["tokenizer"],
    "pretrain": ["init"],
    "ppo": ["judge"],
}  # keys that may name bytes outside the chain
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]


@pytest.mark.parametrize("name", identity.STAGES)
def test_deps_are_the_folders_that_run_takes(name: str) -> None:
    signature = inspect.signature(importlib.import_module(identity.MODULES[name]).run)
    taken = [p for p in signature.parameters if p not in ("cfg", "out", "scratch", "log", "executor")]
    given = [key for key in OUTSIDE.get(name, []) if key != "decontaminate"]  # validate reads the files itself
    assert sorted([*dvc.inputs_of(ROOT, name), *given]) == sorted(taken)


@pytest.mark.parametrize("name", identity.STAGES)
def test_a_stage_depends_on_its_section_and_its_code(name: str) -> None:
    stage = STAGES[name]
    assert stage["cmd"] == f'exec env PATH="$PWD/.venv/bin:$PATH" forja stage {name}'
    assert stage["params"] == [name, {"code.yaml": [name, *OUTSIDE.get(name, [])]}]
    assert stage["outs"] == [f"artifacts/{name}"]
    assert all(dep == "data" or Path(dep).name in identity.STAGES for dep in stage["deps"])


def test_the_stages_are_the_chain() -> None:
    assert list(STAGES) == ["code", *identity.STAGES]


def stale_stages(root: Path, **changes: dict[str, object]) -> set[str]:
    return {stage for stage, reasons in dvc.stale(root, params(**changes)).items() if reasons}


def test_stale_follows_the_graph(checkout: Path, fake: object) -> None:
    code = identity.code_hashes(checkout)
    (checkout / "data.dvc").write_text("outs: [{md5: data.dir, path: data}]\n")
    entries = {}
    for name in identity.STAGES:
        seal(checkout, name, {"x": name})
        deps = [{"path": d, "md5": f"{Path(d).name}.dir"} for d in STAGES[name]["deps"]]
        held = {"params.yaml": {name: section()}, "code.yaml": {name: code[name]}}
        outs = [{"path": f"artifacts/{name}", "md5": f"{name}.dir"}]
        entries[name] = {"cmd": STAGES[name]["cmd"], "deps": deps, "params": held, "outs": outs}
    (checkout / "dvc.lock").write_text(yaml.safe_dump({"stages": entries}))
    assert stale_stages(checkout) == set()
    assert stale_stages(checkout, reward=section(lr=0.2)) == {"reward", "ppo", "quantize", "evaluate"}
    assert stale_stages(checkout, referee=section(lr=0.2)) == {"referee", "evaluate"}
    assert dvc.stale(checkout, params(reward=section(lr=0.2)))["reward"] == ["reward.lr: 0.1 -> 0.2"]
    (checkout / "artifacts/quantize/record.json").unlink()
    assert stale_stages(checkout) == {"quantize", "evaluate"}
    (checkout / "data.dvc").write_text("outs: [{md5: other.dir, path: data}]\n")
    assert stale_stages(checkout) == set(identity.STAGES)
    assert dvc.stale(checkout, params())["validate"] == ["input data changed"]


def test_a_small_number_is_a_number(tmp_path: Path) -> None:
    """DVC writes 1e-05 into dvc.lock where params.yaml says 1.0e-05: one value, and no reason to run a stage again."""
    (tmp_path / "a.yaml").write_text("x: 1e-05\ny: 1.0e-05\nz: 1e5x\nhash: 12345e\n")
    assert dvc.read_yaml(tmp_path / "a.yaml") == {"x": 1e-05, "y": 1e-05, "z": "1e5x", "hash": "12345e"}
