from pathlib import Path

import pytest
import yaml

from components.artifact import ForjaError
from pipelines import identity

FILES = {
    "components/__init__.py": "",
    "components/train/__init__.py": "",
    "components/train/pretrain.py": "from components.train.loop import fit\n\ndef run():\n    return fit()\n",
    "components/train/sft.py": "def run():\n    from components.train import loop\n    return loop.fit()\n",
    "components/train/loop.py": '"""A loop."""\n\ndef fit():\n    """Fits."""\n    return 1  # one\n',
    "components/train/ppo.py": "from . import relative\n",
    "components/train/relative.py": "import importlib\nimportlib.import_module('components.late')\n",
    "components/late.py": "LATE = 1\n",
    "components/lonely.py": "ALONE = 1\n",
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def changed(tree: Path, name: str, text: str) -> set[str]:
    """The stages whose hash another text of one module changes."""
    before = identity.code_hashes(tree)
    (tree / name).write_text(text)
    after = identity.code_hashes(tree)
    return {stage for stage in after if after[stage] != before[stage]}


def test_comments_docstrings_and_formatting_do_not_count(tree: Path) -> None:
    other = "'''Another docstring.'''\n\n\ndef fit():\n    # a comment\n    return (\n        1\n    )\n"
    assert changed(tree, "components/train/loop.py", other) == set()


def test_a_helper_counts_for_the_stages_that_reach_it(tree: Path) -> None:
    assert changed(tree, "components/train/loop.py", "def fit():\n    return 2\n") == {"pretrain", "sft"}


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("components/train/pretrain.py", {"pretrain"}),
        ("components/train/relative.py", {"ppo"}),
        ("components/late.py", {"ppo"}),
        ("components/lonely.py", set()),
        ("components/train/__init__.py", {"pretrain", "sft", "reward", "referee", "ppo"}),
    ],
)
def test_a_change_reaches_exactly(tree: Path, name: str, stages: set[str]) -> None:
    assert changed(tree, name, FILES[name] + "CHANGED = 2\n") == stages


def test_code_yaml_holds_the_stages_of_dvc(tree: Path) -> None:
    identity.write_code_yaml(tree, {"init": None, "tokenizer": "5e"})
    written = yaml.safe_load((tree / "code.yaml").read_text())
    assert sorted(written) == sorted([*identity.STAGES, "init", "tokenizer"])
    assert written["tokenizer"] == "5e"


def test_code_that_does_not_parse_is_named(tree: Path) -> None:
    (tree / "components" / "late.py").write_text("def (:\n")
    with pytest.raises(ForjaError, match=r"late\.py:1"):
        identity.code_hashes(tree)
