"""`forja data diff`: which rows came, went and changed between two data snapshots.

A row is the same where all it says is the same, wherever it stands in its file. Of the others, one whose id is in both
snapshots changed. The rows are read from DVC's cache; the working tree is not touched.
"""

import hashlib
import json
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import yaml
from rich.markup import escape
from rich.table import Table

from components.artifact import ForjaError, to_json
from pipelines import dvc
from pipelines.console import console, say

PLACE = ("id", "line", "provenance")  # where a row comes from is not what it says
EXAMPLES = 3
Where = tuple[str, str]  # table, source


class Snapshot(NamedTuple):
    """A snapshot's name, DVC's hash of it, and its files: path below data/ -> (DVC's hash, where its bytes lie)."""

    name: str
    version: str | None
    files: Mapping[str, tuple[str, Path]]


def show(root: Path, old: str, new: str | None, as_json: bool) -> None:
    """Print what came, went and changed from revision `old` to `new`, or to what lies here."""
    with tempfile.TemporaryDirectory() as folder:
        before = at_revision(root, old, Path(folder) / "old")
        after = at_revision(root, new, Path(folder) / "new") if new else here(root)
        found = compare(before, after)
    if as_json:
        print(to_json(found), end="")
        return
    table = Table("table", "source", "came", "went", "changed", "such as", title=f"{before.name} -> {after.name}")
    for column in table.columns[2:5]:
        column.justify = "right"
    for r in found["rows"]:
        examples = [
            f"{sign}{name}" for sign, names in zip("+-~", r["examples"].values(), strict=True) for name in names
        ]
        counts = [f"{r[key]:,}" for key in ("came", "went", "changed")]
        table.add_row(r["table"], escape(r["source"]), *counts, escape(" ".join(examples[:EXAMPLES])))
    if found["rows"]:
        console.print(table)
    else:
        say(f"no row differs between {before.name} and {after.name}")


def at_revision(root: Path, revision: str, temporary: Path) -> Snapshot:
    """The snapshot that data.dvc names in a git revision; an empty one where it has no data.dvc."""
    known = git(root, "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}")
    if known is None:
        raise ForjaError(f"{revision}: no revision of this git repository; see `git log -- data.dvc`")
    text = git(root, "show", f"{revision}:./data.dvc")
    if text is None:
        return Snapshot(f"{revision} (no data.dvc)", None, {})
    version = yaml.safe_load(text)["outs"][0]["md5"]
    files = listed(cache_of(root), version)
    if files is None:  # not here: DVC asks the remotes
        command = [*dvc.DVC, "get", "--quiet", "--rev", known.strip(), str(root), "data", "--out", str(temporary)]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)  # noqa: S603
        if done.returncode:
            why = " ".join(done.stderr.split())[-200:]
            raise ForjaError(f"{revision}: neither DVC's cache nor a remote holds data {version} ({why}); dvc pull it")
        files = _on_disk(temporary)
    return Snapshot(revision, version, files)


def here(root: Path) -> Snapshot:
    """The snapshot that lies in data/."""
    version = dvc.data_version(root)
    files = (listed(cache_of(root), version) if version else None) or _on_disk(root / "data")
    if not files:
        raise ForjaError("data/: nothing lies here; `dvc pull`, or take a snapshot with `forja ingest`")
    return Snapshot("the working tree", version, files)


def git(root: Path, *command: str) -> str | None:
    done = subprocess.run(["git", *command], cwd=root, capture_output=True, text=True, check=False)  # noqa: S603, S607
    return done.stdout if done.returncode == 0 else None


def cache_of(root: Path) -> Path:
    done = subprocess.run([*dvc.DVC, "cache", "dir"], cwd=root, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise ForjaError(f"dvc cache dir: {' '.join(done.stderr.split())}; run `dvc doctor`")
    return (root / done.stdout.strip()) / "files" / "md5"


def listed(cache: Path, version: str) -> dict[str, tuple[str, Path]] | None:
    """The files of a folder in DVC's cache, or None where one of them is not there."""
    listing = cache / version[:2] / version[2:]
    if not listing.is_file():
        return None
    entries = json.loads(listing.read_bytes())
    files = {e["relpath"]: (e["md5"], cache / e["md5"][:2] / e["md5"][2:]) for e in entries}
    return files if all(path.is_file() for _, path in files.values()) else None


def _on_disk(folder: Path) -> dict[str, tuple[str, Path]]:
    return {p.relative_to(folder).as_posix(): (_md5(p), p) for p in sorted(folder.rglob("*")) if p.is_file()}


def _md5(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def compare(before: Snapshot, after: Snapshot) -> dict[str, Any]:
    """What came, went and changed by table and source, with examples. Files that are the same are not read."""
    same = {name for name, (digest, _) in after.files.items() if before.files.get(name, ("",))[0] == digest}
    old, new = (_contents(s, same) for s in (before, after))
    for where in {*old, *new}:
        _cancel(old.setdefault(where, {}), new.setdefault(where, {}))
    rows = []
    for where in sorted({*old, *new}):
        gone, fresh = _ids(old[where]), _ids(new[where])
        changed = gone.keys() & fresh.keys()
        came, went = fresh.keys() - changed, gone.keys() - changed
        if came or went or changed:
            groups = {"came": came, "went": went, "changed": changed}
            counts = {key: sum(max(gone.get(i, 0), fresh.get(i, 0)) for i in ids) for key, ids in groups.items()}
            examples = {key: sorted(ids)[:EXAMPLES] for key, ids in groups.items()}
            rows.append({"table": where[0], "source": where[1], **counts, "examples": examples})
    versions = {key: {"revision": s.name, "data": s.version} for key, s in (("old", before), ("new", after))}
    return {**versions, "rows": rows}


Contents = dict[bytes, list[str]]  # the hash of what rows say: their ids


def _contents(snapshot: Snapshot, same: set[str]) -> dict[Where, Contents]:
    found: dict[Where, Contents] = {}
    for name, (_, path) in sorted(snapshot.files.items()):
        if name in same or not name.endswith(".jsonl"):
            continue
        table = name.removesuffix(".jsonl") if "/" not in name else name.partition("/")[0]
        for row in _rows(path):
            row_id = f"{row['file']}:{row['line']}" if table == "quarantine" else str(row.get("id"))
            said = {k: v for k, v in row.items() if k not in PLACE and (k != "file" or table != "quarantine")}
            digest = hashlib.blake2b(json.dumps(said, sort_keys=True).encode(), digest_size=16).digest()
            found.setdefault((table, str(row.get("source"))), {}).setdefault(digest, []).append(row_id)
    return found


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as f:
        for line in f:
            yield orjson.loads(line)


def _cancel(old: Contents, new: Contents) -> None:
    """Take out, one against one, rows that say the same; those of the same id first."""
    for digest in old.keys() & new.keys():
        gone, fresh = Counter(old[digest]), Counter(new[digest])
        both = gone & fresh
        gone, fresh = gone - both, fresh - both
        left, right = sorted(gone.elements()), sorted(fresh.elements())
        n = min(len(left), len(right))
        old[digest], new[digest] = left[n:], right[n:]


def _ids(contents: Contents) -> Counter[str]:
    return Counter(row_id for ids in contents.values() for row_id in ids)
