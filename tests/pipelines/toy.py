"""What the tests of pipelines share: the recipe and the artifacts of a toy checkout."""

import shutil
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from components.artifact import write_record
from pipelines import identity

ROOT = Path(__file__).parents[2]


class Config(BaseModel, frozen=True, extra="forbid"):
    lr: float
    steps: int


def section(**changes: Any) -> dict[str, Any]:
    return {"lr": 0.1, "steps": 3, **changes}


def params(**changes: dict[str, Any]) -> dict[str, Any]:
    sections = {name: section() for name in identity.MODULES}
    top = {"recipe": "toy", "seed": 7}
    return {**top, **sections, "promote": {"name": "forja", "alias": "champion"}, **changes}


def seal(root: Path, stage: str, files: dict[str, str], **record: Any) -> Path:
    """A finished artifact with these files."""
    folder = root / ("data" if stage == "ingest" else f"artifacts/{stage}")
    shutil.rmtree(folder, ignore_errors=True)
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    write_record(folder, stage, **record)
    return folder
