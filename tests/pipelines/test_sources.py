"""A model and a tokenizer outside the chain: DVC runs the stages again when their bytes change, and says so before."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from cloned import call, clone_to, forja
from toy import ROOT, params, seal, section

sys.path.append(str(ROOT / "tests" / "model"))
sys.path.append(str(ROOT / "tests" / "train"))
from foreign import CONFIGS, random_model, saved
from test_resume import write_tables

from components.artifact import ForjaError, read_record, write_record
from pipelines import dvc, identity


def test_stale_when_the_bytes_change(checkout: Path, fake: object) -> None:
    model = checkout / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"one")
    (model / "tokenizer.json").write_text("{}")
    held_out = checkout / "held-out.jsonl"
    held_out.write_text('{"question": "Who?", "choices": ["a", "b"], "answer": 0}\n')
    changes = {
        "validate": section(decontaminate=["held-out.jsonl"]),
        "pretrain": section(init="model"),
        "tokenize": section(tokenizer=str(model)),
        "ppo": section(judge="rules.py:right"),
    }
    (checkout / "rules.py").write_text("right = lambda prompt, answer, truth: 1.0\n")
    held = dvc.sources(checkout, params(**changes))
    assert dvc.sources(checkout, params()) == dict.fromkeys(identity.SOURCES.values())
    assert dvc.sources(checkout, params(ppo=section(judge="right_number")))["judge"] is None
    code = identity.code_hashes(checkout)
    graph = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    (checkout / "data.dvc").write_text("outs: [{md5: data.dir, path: data}]\n")
    entries: dict[str, Any] = {}
    for name in identity.STAGES:
        seal(checkout, name, {"x": name})
        deps = [{"path": d, "md5": f"{Path(d).name}.dir"} for d in graph[name]["deps"]]
        kept = {
            name: code[name],
            **({identity.SOURCES[name]: held[identity.SOURCES[name]]} if name in identity.SOURCES else {}),
        }
        locked = {"params.yaml": {name: changes.get(name, section())}, "code.yaml": kept}
        outs = [{"path": f"artifacts/{name}", "md5": f"{name}.dir"}]
        entries[name] = {"cmd": graph[name]["cmd"], "deps": deps, "params": locked, "outs": outs}
    (checkout / "dvc.lock").write_text(yaml.safe_dump({"stages": entries}))

    def stale() -> dict[str, list[str]]:
        return {stage: reasons for stage, reasons in dvc.stale(checkout, params(**changes)).items() if reasons}

    assert stale() == {}
    held_sets = dvc.outside(checkout, "validate", changes["validate"])
    held_out.write_text('{"question": "Why?", "choices": ["a", "b"], "answer": 0}\n')
    assert stale()["validate"] == ["what validate.decontaminate names changed"]
    assert dvc.outside(checkout, "validate", changes["validate"]) != held_sets
    held_out.write_text('{"question": "Who?", "choices": ["a", "b"], "answer": 0}\n')
    assert dvc.outside(checkout, "validate", changes["validate"]) == held_sets
    assert stale() == {}
    (checkout / "rules.py").write_text("right = lambda prompt, answer, truth: 0.0\n")
    assert stale()["ppo"] == ["what ppo.judge names changed"]
    (checkout / "rules.py").write_text("right = lambda prompt, answer, truth: 1.0\n")
    assert stale() == {}
    before = dvc.identify(checkout, "pretrain", changes["pretrain"], "c")
    (model / "model.safetensors").write_bytes(b"two")
    assert stale()["pretrain"] == ["what pretrain.init names changed"] and "tokenize" not in stale()
    after = dvc.identify(checkout, "pretrain", changes["pretrain"], "c")
    assert before[0] != after[0] and set(after[1]) == {"tokenize", "init"}
    (model / "model.safetensors").write_bytes(b"one")
    assert stale() == {}
    (model / "tokenizer.json").write_text("[]")
    assert set(stale()) >= {"tokenize", "pretrain"}
    (model / "tokenizer.json").unlink()
    with pytest.raises(ForjaError, match=r"tokenize.tokenizer: .*tokenizer.json is missing"):
        stale()


def test_a_sealed_folder_is_known_by_its_record(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"one")
    loose = identity.bytes_of(tmp_path)
    write_record(tmp_path, "import")
    sealed = identity.bytes_of(tmp_path)
    assert sealed != loose
    (tmp_path / "x.safetensors").write_bytes(b"two")
    assert identity.bytes_of(tmp_path) == sealed  # its stage verifies every file before it reads one
    write_record(tmp_path, "import")
    assert identity.bytes_of(tmp_path) != sealed


def test_dvc_redoes_pretrain_when_the_model_changes(tmp_path: Path) -> None:
    """The real commands on a real clone, from a table that lies there: tokenize and pretrain with no steps."""
    clone = clone_to(tmp_path / "clone")
    source = saved(random_model(CONFIGS["llama"]), clone / "theirs")
    write_tables(seal(clone, "validate", {"x": ""}))
    write_record(clone / "artifacts" / "validate", "validate")
    sets = ["pretrain.model=null", "pretrain.init=theirs", "pretrain.context=32", "pretrain.steps=0"]
    sets += ["tokenize.vocab_size=null", "tokenize.min_frequency=null", "tokenize.tokenizer=theirs"]
    forja(clone, "use", "conf/smoke.yaml", *(word for s in [*sets, "pretrain.val_windows=2"] for word in ("--set", s)))

    def repro() -> dict[str, Any]:
        """What the three stages' records say once DVC has looked at each."""
        call(clone, "dvc", "repro", "--single-item", "code", "tokenize", "pretrain")
        return {s: read_record(clone / "artifacts" / s) for s in ("tokenize", "pretrain")}

    first = repro()
    assert set(first["pretrain"].inputs) == {"tokenize", "init"}
    assert set(first["tokenize"].inputs) == {"validate", "tokenizer"}
    assert repro() == first
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    second = repro()
    assert second["tokenize"] == first["tokenize"]
    assert second["pretrain"].inputs["init"] != first["pretrain"].inputs["init"]
    assert second["pretrain"].files["model.json"] != first["pretrain"].files["model.json"]
    (source / "config.json").write_text(json.dumps(config))
    assert repro()["pretrain"].files == first["pretrain"].files
