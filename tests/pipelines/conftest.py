"""A checkout with stages of toy size: the real dvc.yaml, and one fake module that stands for every stage."""

import shutil
import sys
import types
from pathlib import Path

import pytest
import yaml
from toy import ROOT, Config, params

from pipelines import identity


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The module behind every stage. A test gives it the `run` that it needs."""
    module = types.ModuleType("fake_stage")
    module.Config = Config  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fake_stage", module)
    for name in identity.MODULES:
        monkeypatch.setitem(identity.MODULES, name, "fake_stage")
    monkeypatch.setattr("pipelines.stages.die_with_parent", lambda parent: None)
    return module


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params()))
    (tmp_path / "components").mkdir()
    return tmp_path
