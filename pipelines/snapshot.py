"""The data snapshot: data/, and data.dvc that names it.

`meta` in data.dvc says who took the snapshot: a recipe (then another ingest section or other ingest code replaces it)
or a person by hand (then it stays until a person takes another).
"""

import shutil
import subprocess
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml
from pydantic import ValidationError

from components.artifact import RECORD, ForjaError, fingerprint, read_record, write_atomic
from pipelines import dvc
from pipelines.identity import code_hashes
from pipelines.recipe import complaints
from pipelines.stages import close_diary, diary_of, logging_to, open_diary

STAGE = "ingest"


class Need(NamedTuple):
    """What must be done before `validate` can run, and why."""

    action: Literal["keep", "fetch", "ingest"]
    reason: str


def need(root: Path, config: dict[str, Any]) -> Need:
    """Compare the snapshot that lies here with the `ingest` section of the recipe in force."""
    pointer = dvc.read_yaml(root / "data.dvc")
    if not pointer:
        return Need("ingest", "there is no data.dvc")
    meta = pointer.get("meta") or {}
    present = (root / "data" / RECORD).is_file()
    if meta.get("by") == "hand":
        return Need("keep" if present else "fetch", "the snapshot was taken by hand, so the recipe does not replace it")
    if meta.get("config") != config:
        return Need("ingest", "the recipe's ingest section is another one than the snapshot's")
    if meta.get("code") != code_hashes(root)[STAGE]:
        return Need("ingest", "the code of ingest changed")
    return Need("keep", "the snapshot is the recipe's") if present else Need("fetch", "data/ is missing")


def fetch(root: Path) -> bool:
    """data/ as data.dvc names it, from DVC's cache or the remote; False where neither holds it."""
    for command in (["checkout", "data.dvc"], ["pull", "data.dvc"]):
        done = subprocess.run([*dvc.DVC, *command], cwd=root, capture_output=True, check=False)  # noqa: S603
        if done.returncode == 0 and (root / "data" / RECORD).is_file():
            return True
    return False


def fetch_or_ingest(root: Path, config: dict[str, Any]) -> None:
    """Mend a checkout whose data/ is missing: fetch what data.dvc names, or take the recipe's snapshot again.

    Raises ForjaError for a snapshot taken by hand that cannot be fetched: no recipe can make it again.
    """
    wanted = need(root, config)
    if wanted.action == "fetch" and not fetch(root):
        if "by hand" in wanted.reason:
            raise ForjaError("data/: missing, and DVC's cache and remotes do not hold it; run `forja ingest` again")
        wanted = Need("ingest", "data/ is missing and DVC does not hold it")
    if wanted.action == "ingest":
        take(root, config, by="recipe")


def take(root: Path, config: dict[str, Any], by: Literal["recipe", "hand"]) -> dict[str, float]:
    """Ingest into data/, `dvc add` it and say in data.dvc who did. Returns the rows of each table."""
    import components.data.ingest as module

    try:
        cfg = module.Config.model_validate(config)
    except ValidationError as e:
        raise ForjaError("\n".join(complaints(e, STAGE, module.Config))) from None
    config = cfg.model_dump(mode="json")
    mark = fingerprint(STAGE, config, "", {})
    diary = diary_of(root, STAGE, mark)
    open_diary(diary, STAGE, mark, None, resumed=False)
    try:
        with logging_to(diary, STAGE) as log:
            counts = module.ingest(cfg, root / "data", log)
        _add(root, config, by)
    except BaseException as e:
        close_diary(diary, "failed", reason=str(e), exit_code=getattr(e, "exit_code", 1))
        raise
    shutil.copyfile(root / "data" / RECORD, diary / RECORD)
    close_diary(diary, "finished", data_version=dvc.data_version(root))
    return counts


def _add(root: Path, config: dict[str, Any], by: str) -> None:
    read_record(root / "data")
    done = subprocess.run(  # noqa: S603
        [*dvc.DVC, "add", "--quiet", "data"], cwd=root, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise ForjaError(f"dvc add data: {' '.join(done.stderr.split())}; run `dvc doctor`")
    pointer = dvc.read_yaml(root / "data.dvc")
    pointer["meta"] = {"by": by} if by == "hand" else {"by": by, "code": code_hashes(root)[STAGE], "config": config}
    write_atomic(root / "data.dvc", yaml.safe_dump(pointer, sort_keys=False, allow_unicode=True))
