import json
from pathlib import Path
from typing import Any

import pytest
from toy import ROOT, params, seal, section

from components.artifact import Damaged, ForjaError, digest
from pipelines import dvc, identity, promote

GATE = {
    "name": "small",
    "metric": "int8.bytes_ratio",
    "value": 0.3,
    "comparison": "at_most",
    "limit": 0.35,
    "margin": 0.05,
    "passed": True,
    "reason": "small: 0.3 is at most 0.35",
}


@pytest.fixture
def chain(checkout: Path, fake: Any) -> Path:
    """A whole chain of artifacts that belong together."""
    seal(checkout, "ingest", {"corpus.jsonl": "{}"}, config=section())
    gates(checkout, "promote", [GATE])
    return checkout


def gates(root: Path, verdict: str, judged: list[dict[str, Any]]) -> None:
    code = identity.code_hashes(root)
    for stage in identity.STAGES:
        inputs = {name: digest(path) for name, path in dvc.inputs_of(root, stage).items()}
        text = json.dumps({"verdict": verdict, "gates": judged})
        files = {"gates.json": text} if stage == "evaluate" else {"int8/model.json": "{}"}
        seal(root, stage, files, config=section(), code=code[stage], inputs=inputs)


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """No MLflow: notes that it was asked."""
    asked: list[str] = []

    def connect(root: Path) -> None:
        asked.append("connect")
        raise RuntimeError("the registry was asked")

    monkeypatch.setattr(promote, "connect", connect)
    return asked


def test_when_all_holds_the_registry_is_asked(chain: Path, registry: list[str]) -> None:
    with pytest.raises(RuntimeError, match="the registry was asked"):
        promote.promote(chain, params(), {})


@pytest.mark.parametrize(
    ("verdict", "judged"),
    [
        ("hold", [{**GATE, "value": 0.4, "margin": -0.05, "passed": False, "reason": "small: not at most 0.35"}]),
        ("promote", [{**GATE, "value": None, "margin": None, "reason": "no metric"}]),
        ("promote", [{**GATE, "value": float("nan")}]),
        ("promote", [{**GATE, "limit": float("inf")}]),
        ("promote", [{**GATE, "passed": "yes"}]),
        ("promote", [GATE, {**GATE, "passed": False}]),
        ("hold", [GATE]),
        ("promote", []),
    ],
)
def test_fails_closed(chain: Path, registry: list[str], verdict: str, judged: list[dict[str, Any]]) -> None:
    gates(chain, verdict, judged)
    with pytest.raises(promote.Held) as e:
        promote.promote(chain, params(), {})
    assert e.value.exit_code == 3
    assert registry == []


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"verdict": "promote", "gates": [{}]}'])
def test_gates_that_are_none(chain: Path, registry: list[str], text: str) -> None:
    inputs = {name: digest(path) for name, path in dvc.inputs_of(chain, "evaluate").items()}
    code = identity.code_hashes(chain)["evaluate"]
    seal(chain, "evaluate", {"gates.json": text}, config=section(), code=code, inputs=inputs)
    with pytest.raises(Damaged, match=r"gates\.json"):
        promote.promote(chain, params(), {})


def test_an_artifact_of_another_chain_is_refused(chain: Path, registry: list[str]) -> None:
    code = identity.code_hashes(chain)["ppo"]
    inputs = {name: digest(path) for name, path in dvc.inputs_of(chain, "ppo").items()}
    seal(chain, "ppo", {"model.json": "another"}, config=section(), code=code, inputs=inputs)
    with pytest.raises(ForjaError, match=r"artifacts/quantize: made from another .*artifacts/ppo"):
        promote.promote(chain, params(), {})


def test_an_artifact_of_another_recipe_is_refused(chain: Path, registry: list[str]) -> None:
    with pytest.raises(ForjaError, match="artifacts/sft: made by another recipe"):
        promote.promote(chain, params(sft=section(lr=0.2)), {})


def test_an_artifact_of_other_code_is_refused(chain: Path, registry: list[str], monkeypatch: Any) -> None:
    other = {**identity.code_hashes(chain), "reward": "other"}
    monkeypatch.setattr(promote, "code_hashes", lambda root: other)
    with pytest.raises(ForjaError, match="artifacts/reward: made by other code"):
        promote.promote(chain, params(), {})


def test_tampered_bytes_are_refused(chain: Path, registry: list[str]) -> None:
    (chain / "artifacts" / "quantize" / "int8" / "model.json").write_text("{ }")
    with pytest.raises(Damaged, match=r"int8/model\.json"):
        promote.promote(chain, params(), {})


def test_the_served_model_unpickles_nothing() -> None:
    text = (ROOT / "pipelines" / "served_model.py").read_text()
    assert "import pickle" not in text and "torch.load" not in text
