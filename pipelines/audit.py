"""`forja data audit`: what is in any data, as tables for a person or as JSON for a machine."""

import json
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from components.data.audit import audit
from pipelines.console import console


def show(paths: list[str], against: list[str], as_json: bool) -> None:
    """Audit `paths` and print what was found; progress goes to stderr."""
    from rich.console import Console

    bar = Progress(TextColumn("{task.description}"), BarColumn(), console=Console(stderr=True), transient=True)
    with bar:
        task = bar.add_task("reading", total=1.0)
        found = audit(paths, against, lambda what, part: bar.update(task, description=what, completed=part))
    if as_json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
        return
    console.print(_table(found))


def _table(found: dict[str, Any]) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    dups, dirty, personal = found["duplicates"], found["contamination"], found["pii"]
    lines = [
        ("records read", f"{found['records']:,}"),
        ("rows", f"{found['rows']:,}: {_counts(found['tables'])}"),
        ("shapes", _counts(found["shapes"])),
        ("languages", _counts(found["languages"])),
        ("exact duplicates", f"{dups['exact']:,}"),
        ("near-duplicates", f"{dups['near']:,} more{_such(e['row'] + ' of ' + e['of'] for e in dups['examples'])}"),
        ("contaminated", _contaminated(dirty)),
        *(("", f"{e['row']} holds “{e['phrase']}” of {e['held']}") for e in dirty["examples"]),
        ("low quality", f"{_counts(found['quality']['filters'])} of {found['tables'].get('corpus', 0):,} documents"),
        ("personal data", f"{personal['rows']:,} rows: {_counts(personal['kinds'])}"),
        ("turned away", f"{found['quarantine']['records']:,}: {_counts(found['quarantine']['reasons'])}"),
        ("breaks rules", f"{found['rules']['rows']:,} rows: {_counts(found['rules']['reasons'])}"),
        ("poison", f"{found['poison']['rows']:,} rows{_such(found['poison']['examples'])}"),
    ]
    for name, value in lines:
        table.add_row(name, value)
    return table


def _contaminated(found: dict[str, Any]) -> str:
    if not found["against"]:
        return "name the eval sets with --against"
    own = f"; {found['own']:,} other rows are the eval sets' own and were not looked at" if found["own"] else ""
    return f"{found['rows']:,} rows{own}"


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {n:,}" for name, n in counts.items()) or "none"


def _such(examples: Any) -> str:
    shown = list(examples)[:3]
    return f", such as {'; '.join(shown)}" if shown else ""
