"""Which bytes a recipe's sources on disk are, without reading what has not changed.

A file that has the path, size and time of change it had when it was last read has the sha256 it had then; they are kept
in .forja/sources.json. What a source is, is a digest over its files' names and sha256.
"""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from components.artifact import sha256, write_atomic
from components.data.ingest import MADE
from components.data.readers import files_of

Known = dict[str, list[Any]]  # path: [size, mtime_ns, sha256]


def located(root: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The ingest section with its paths as seen from the checkout, wherever the command was given."""
    sources = [{**s, "source": _at(root, s["source"])} for s in config["sources"]]
    excluded = config.get("exclude_ids")
    return {**config, "sources": sources, "exclude_ids": excluded and _at(root, excluded)}


def _at(root: Path, source: str) -> str:
    return source if source in MADE or source.startswith("hf:") else str(root / Path(source).expanduser())


def digests(root: Path, config: dict[str, Any]) -> dict[str, str]:
    """{source: digest of its files}; what is made and the hub have none. Reads only files that are new or changed.

    Raises ForjaError where a source is missing.
    """
    known = _known(root)
    found: dict[str, list[tuple[str, Path]]] = {}
    for given, at in zip(config["sources"], located(root, config)["sources"], strict=True):
        name, where = given["source"], at["source"]
        if name not in MADE and not name.startswith("hf:"):
            folder = Path(where)
            files = files_of(where)
            found[name] = [(p.relative_to(folder).as_posix() if folder.is_dir() else p.name, p) for p in files]
    if config.get("exclude_ids"):
        path = Path(located(root, config)["exclude_ids"])
        found["exclude_ids"] = [(path.name, path)] if path.is_file() else []
    paths = [path for files in found.values() for _, path in files]
    now = {str(p.resolve()): [(s := p.stat()).st_size, s.st_mtime_ns] for p in paths}
    changed = [path for path, stat in now.items() if known.get(path, [])[:2] != stat]
    with ThreadPoolExecutor() as pool:
        hashed = dict(zip(changed, pool.map(sha256, map(Path, changed)), strict=True))
    if changed:
        known |= {path: [*now[path], digest] for path, digest in hashed.items()}
        (root / ".forja").mkdir(exist_ok=True)
        write_atomic(root / ".forja" / "sources.json", json.dumps(known, sort_keys=True) + "\n")
    return {name: _digest([(n, known[str(p.resolve())][2]) for n, p in files]) for name, files in found.items()}


def _digest(files: list[tuple[str, str]]) -> str:
    text = "".join(f"{digest}  {name}\n" for name, digest in sorted(files))
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def _known(root: Path) -> Known:
    with suppress(FileNotFoundError, ValueError):
        known: Known = json.loads((root / ".forja" / "sources.json").read_bytes())
        return known
    return {}
