"""`forja eval`: lm-evaluation-harness' tasks on a checkpoint, with progress and a table."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.table import Column, Table

from components.artifact import ForjaError, to_json, write_atomic
from pipelines.checkout import home
from pipelines.console import console, say, stage_progress


def show(root: Path, model: Path, data: Path | None, said: dict[str, Any], fresh: bool, as_json: Path | None) -> None:
    """Score, or take what was scored before, and show it."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # lm-eval's bars, one a task
    from components.release.suite import RESULTS, ROWS, Options, scored

    try:
        options = Options.model_validate(said)
    except ValidationError as e:
        first = e.errors()[0]
        key = str(first["loc"][0]).replace("_", "-")
        raise ForjaError(f"--{key}: {first['msg']} (was {first['input']!r})") from None
    cache = home(root) / "eval"
    cache.mkdir(exist_ok=True)
    with _progress() as told:
        place, known = scored(model, options, data, cache, told, fresh)
    found = json.loads((place / RESULTS).read_bytes())
    console.print(table(found))
    if found["missing"]:
        named = ", ".join(found["missing"][:4]) + (" ..." if len(found["missing"]) > 4 else "")
        say(f"The groups are not whole: there are no data for {len(found['missing'])} of their tasks ({named})")
    say(f"Rows: {place / ROWS}{', scored before' if known else ''}")
    if as_json is not None:
        write_atomic(as_json, to_json({"model": str(model), "options": options.model_dump(mode="json"), **found}))


@contextmanager
def _progress() -> Iterator[Any]:
    with stage_progress("eval") as log:
        yield lambda what, done, of: log({"progress": done / of}, done)


def table(found: dict[str, Any]) -> Table:
    """Groups first, then tasks: each number with its 95 % interval and the rows behind it."""
    task = Column("task", overflow="fold")
    rows = Table(task, "examples", "metric", "value", "95 %", "rows", title="Benchmarks")
    for kind in ("groups", "tasks"):
        for name, entry in found[kind].items():
            for metric, m in entry["metrics"].items():
                interval = "-" if m["low"] is None else f"{m['low']:.4f} to {m['high']:.4f}"
                value = "-" if m["value"] is None else f"{m['value']:.4f}"
                rows.add_row(name, str(entry.get("few_shot", "")), metric, value, interval, f"{m['n']:,}")
    return rows
