"""The data snapshot: data/, and data.dvc that names it.

`meta` in data.dvc says who took the snapshot, and of what: a recipe (then another ingest section, other ingest code or
changed source files replace it) or a person by hand (then it stays until a person takes another).
"""

import shutil
import subprocess
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml
from pydantic import ValidationError

from components.artifact import RECORD, ForjaError, fingerprint, read_record, write_atomic
from components.data.spread import Executor
from pipelines import dvc, source_files
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
        return Need("keep" if present else "fetch", _by_hand(meta.get("config") or {}, config))
    if meta.get("config") != config:
        return Need("ingest", "the recipe's ingest section is another one than the snapshot's")
    if meta.get("code") != code_hashes(root)[STAGE]:
        return Need("ingest", "the code of ingest changed")
    try:
        changed = _changed(meta.get("sources", {}), source_files.digests(root, config))
    except ForjaError as e:
        return Need("keep" if present else "fetch", f"the snapshot is the recipe's; its sources are not here ({e})")
    if changed:
        return Need("ingest", f"{changed} changed")
    if not present:
        return Need("fetch", "data/ is missing")
    unread = ", and its source files are unchanged: none is read" if meta.get("sources") else ""
    return Need("keep", f"the snapshot is the recipe's{unread}")


def _by_hand(taken: dict[str, Any], wanted: dict[str, Any]) -> str:
    """Said of a snapshot taken by hand, and where the recipe's sources are others, how to have those."""
    here, recipes = ([s["source"] for s in config.get("sources", [])] for config in (taken, wanted))
    said = f"the snapshot was taken by hand, of {', '.join(here)}"
    if here == recipes:
        return said
    return f"{said}: the recipe's own sources ({', '.join(recipes)}) are not read; delete data.dvc to have them"


def _changed(old: dict[str, str], new: dict[str, str]) -> str:
    return ", ".join(name for name in sorted({*old, *new}) if old.get(name) != new.get(name))


def mark(root: Path, config: dict[str, Any]) -> str:
    """The fingerprint of the snapshot that the ingest section gives on the source files that lie here; where they do
    not, on those that data.dvc tells of."""
    try:
        held = source_files.digests(root, config)
    except ForjaError:
        held = (dvc.read_yaml(root / "data.dvc").get("meta") or {}).get("sources", {})
    return fingerprint(STAGE, config, "", held)


def unchanged(root: Path, config: dict[str, Any]) -> bool:
    """Whether the snapshot that lies here was taken by hand of just these sources, and none has changed."""
    meta = dvc.read_yaml(root / "data.dvc").get("meta") or {}
    same = meta == _meta(root, config, "hand")
    return same and (root / "data" / RECORD).is_file()


def _meta(root: Path, config: dict[str, Any], by: str) -> dict[str, Any]:
    held = source_files.digests(root, config)
    return {"by": by, "code": code_hashes(root)[STAGE], "config": config} | ({"sources": held} if held else {})


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
        take(root, config, "recipe", dvc.section(root, "executor"))


def take(
    root: Path, config: dict[str, Any], by: Literal["recipe", "hand"], executor: dict[str, Any]
) -> dict[str, float]:
    """Ingest into data/, `dvc add` it and say in data.dvc who did. `executor` is the recipe's section. Returns the rows
    of each table."""
    import components.data.ingest as module

    try:
        cfg = module.Config.model_validate(config)
    except ValidationError as e:
        raise ForjaError("\n".join(complaints(e, STAGE, module.Config))) from None
    config = cfg.model_dump(mode="json")
    inputs = source_files.digests(root, config)
    named = fingerprint(STAGE, config, "", inputs)
    diary = diary_of(root, STAGE, named)
    open_diary(diary, STAGE, named, None, resumed=False)
    try:
        with logging_to(diary, STAGE) as log:
            located = module.Config.model_validate(source_files.located(root, config))
            spread = Executor.model_validate(executor)  # checked by the recipe
            counts = module.ingest(located, root / "data", log, config, inputs, spread)
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
    pointer["meta"] = _meta(root, config, by)
    write_atomic(root / "data.dvc", yaml.safe_dump(pointer, sort_keys=False, allow_unicode=True))
