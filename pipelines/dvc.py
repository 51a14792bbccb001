"""DVC, seen from forja: the graph in dvc.yaml, what dvc.lock says, and its commands as child processes."""

import hashlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from components.artifact import ForjaError, digest, fingerprint
from components.data.hub import fetch
from pipelines.identity import SOURCES, STAGES, bytes_of, code_hashes

DVC = [sys.executable, "-m", "dvc"]
FORJA = [sys.executable, "-m", "pipelines.cli"]


class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """YAML as DVC writes it: 1e-05 is a number, where PyYAML alone wants a point in it."""


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def allow_without_git(root: Path) -> None:
    """Where the checkout is no git repository, tell DVC so in its local configuration; else it would not start."""
    if not any((folder / ".git").exists() for folder in (root, *root.parents)):
        subprocess.run(  # noqa: S603
            [*DVC, "config", "--local", "core.no_scm", "true"], cwd=root, capture_output=True, check=False
        )


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping; an absent file is an empty one. Raises ForjaError where it is not one."""
    if not path.is_file():
        return {}
    try:
        value = yaml.load(path.read_bytes(), Loader=Loader) or {}  # noqa: S506  # CSafeLoader
    except yaml.YAMLError as e:
        raise ForjaError(f"{path}: not YAML ({' '.join(str(e).split())}); mend it") from None
    if not isinstance(value, dict):
        raise ForjaError(f"{path}: a mapping is wanted; mend it")
    return value


def inputs_of(root: Path, stage: str) -> dict[str, Path]:
    """{input's name: its folder}, the deps that dvc.yaml gives the stage."""
    stages = read_yaml(root / "dvc.yaml").get("stages", {})
    if stage not in STAGES or stage not in stages:
        raise ForjaError(f"stage {stage}: there is no such stage; one of {', '.join(STAGES)}")
    return {Path(dep).name: root / dep for dep in stages[stage].get("deps", [])}


def source_of(root: Path, stage: str, config: dict[str, Any]) -> dict[str, Path]:
    """{key: where it lies} of the model, tokenizer or function that the stage's section names outside the chain;
    fetched if it lies on a hub.

    Of a tokenizer or a function, the file. Empty for a stage that names none.
    """
    key = SOURCES.get(stage, "")
    named = config.get(key)
    if not named or key == "decontaminate":
        return {}
    if key == "judge":
        named = named.rpartition(":")[0]  # FILE.py:FUNCTION; without a file it is the reward model, or forja's own
    if not named:
        return {}
    path = fetch(named, root)
    if key == "tokenizer" and path.is_dir():
        path /= "tokenizer.json"
    if key == "tokenizer" and not path.is_file():
        raise ForjaError(f"{stage}.{key}: {path} is missing; name a tokenizer.json or a folder that holds one")
    return {key: path}


def outside(root: Path, stage: str, config: dict[str, Any]) -> dict[str, str]:
    """{key: identity of the bytes} of what the stage's section names outside the chain: a tokenizer, a model, a
    function, or the sets that must not be trained on, of which only files that changed are read."""
    if SOURCES.get(stage) == "decontaminate" and config.get("decontaminate"):
        from pipelines import source_files

        held = source_files.digests(root, {"sources": [{"source": path} for path in config["decontaminate"]]})
        return {"decontaminate": hashlib.sha256(repr(sorted(held.items())).encode()).hexdigest()}
    return {key: bytes_of(path) for key, path in source_of(root, stage, config).items()}


def sources(root: Path, params: dict[str, Any]) -> dict[str, str | None]:
    """{key: identity of the bytes that it names}, for every key that may name some; None where it names nothing."""
    found: dict[str, str | None] = dict.fromkeys(SOURCES.values())
    for stage in SOURCES:
        found |= outside(root, stage, params.get(stage) or {})
    return found


def identify(root: Path, stage: str, config: dict[str, Any], code: str) -> tuple[str, dict[str, str]]:
    """The fingerprint that `stage` will have on the inputs that lie here, and the digests of these inputs."""
    inputs = {name: digest(folder) for name, folder in inputs_of(root, stage).items()}
    inputs |= outside(root, stage, config)
    return fingerprint(stage, config, code, inputs), inputs


def section(root: Path, name: str) -> dict[str, Any]:
    """One section of params.yaml."""
    params = read_yaml(root / "params.yaml")
    if not params:
        raise ForjaError("params.yaml: missing; write it with `forja use conf/demo.yaml`")
    if not isinstance(params.get(name), dict):
        raise ForjaError(f"params.yaml: no section {name}; write it again with `forja use RECIPE`")
    return params[name]


def data_version(root: Path) -> str | None:
    """DVC's hash of the data snapshot, as data.dvc names it."""
    outs = read_yaml(root / "data.dvc").get("outs", [])
    return outs[0]["md5"] if outs else None


def locked(root: Path) -> dict[str, Any]:
    """{stage: its entry in dvc.lock}."""
    return read_yaml(root / "dvc.lock").get("stages", {})


def out_hash(root: Path, stage: str) -> str | None:
    """DVC's hash of a stage's result, as dvc.lock names it."""
    outs = locked(root).get(stage, {}).get("outs", [])
    return outs[0]["md5"] if outs else None


def lock_hash(root: Path) -> str | None:
    """The identity of all results together: sha256 of dvc.lock."""
    path = root / "dvc.lock"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def stale(root: Path, params: dict[str, Any], new_data: bool = False) -> dict[str, list[str]]:
    """{stage: reasons why DVC would run it under `params`}, in the order of the chain; no reason means fresh.

    Compares data.dvc, params, code and the hashes in dvc.lock; it does not look into the artifacts. `new_data` says
    that data/ will be ingested first.
    """
    lock, code, outside = locked(root), code_hashes(root), sources(root, params)
    graph = read_yaml(root / "dvc.yaml")["stages"]
    now: dict[str, str | None] = {"data": data_version(root)}
    found: dict[str, list[str]] = {}
    for stage in STAGES:
        entry = lock.get(stage)
        if entry is None:
            found[stage] = ["it has never run here"]
            continue
        reasons = [] if entry["cmd"] == graph[stage]["cmd"] else ["its command in dvc.yaml changed"]
        if not (root / "artifacts" / stage / "record.json").is_file():
            reasons.append(f"artifacts/{stage} is missing")
        held = entry.get("params", {})
        reasons += _changes(stage, held.get("params.yaml", {}).get(stage, {}), params[stage])
        if held.get("code.yaml", {}).get(stage) != code[stage]:
            reasons.append("its code changed")
        key = SOURCES.get(stage, "")
        if key and held.get("code.yaml", {}).get(key) != outside[key]:
            reasons.append(f"what {stage}.{key} names changed")
        for dep in entry.get("deps", []):
            name = Path(dep["path"]).name
            if found.get(name) or (name == "data" and new_data):
                reasons.append(f"input {name} is made anew")
            elif dep["md5"] != now.get(name):
                reasons.append(f"input {name} changed")
        now[stage] = entry["outs"][0]["md5"]
        found[stage] = reasons
    return found


def _changes(key: str, old: Any, new: Any) -> list[str]:
    """One line a differing leaf: `sft.lr: 0.001 -> 0.0001`."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*new, *(k for k in old if k not in new)]
        return [line for k in keys for line in _changes(f"{key}.{k}", old.get(k), new.get(k))]
    return [] if old == new else [f"{key}: {_short(old)} -> {_short(new)}"]


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 40 else text[:37] + "..."
