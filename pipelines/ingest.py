"""`forja ingest`: a snapshot by hand, and what each source gave."""

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.markup import escape
from rich.table import Column, Table
from rich.text import Text

from components.artifact import ForjaError
from components.data import readers
from components.data.ingest import MADE, Config
from pipelines import dvc, snapshot
from pipelines import recipe as recipes
from pipelines.checkout import only_writer
from pipelines.console import console, say

DEMO = Path("conf/demo.yaml")


def by_hand(root: Path, sources: list[dict[str, Any]], package: str | None) -> None:
    """Ingest `sources`, unless just these lie here already, and show what came of them."""
    with only_writer(root):
        dvc.allow_without_git(root)
        inforce = dvc.read_yaml(root / "params.yaml") or recipes.compose(root, DEMO, [])
        config = {**inforce["ingest"], "sources": [_seen_from(root, s) for s in sources], "package": package}
        try:
            config = Config.model_validate(config).model_dump(mode="json")
        except ValidationError as e:
            raise ForjaError("\n".join(recipes.complaints(e, "ingest", Config))) from None
        if snapshot.unchanged(root, config):
            say(f"data.dvc names these sources already ({dvc.data_version(root)}); none has changed, none was read")
            return
        counts = snapshot.take(root, config, "hand", inforce["executor"])
        sources_told = json.loads((root / "data" / "sources.json").read_bytes())
        console.print(told(sources_told))
        for source in config["sources"]:
            if others := readers.passed_over(root / source["source"]):
                names = ", ".join(f"{readers.shown(ending)} {n:,}" for ending, n in others.most_common(8))
                say(f"{source['source']}: {others.total():,} files are of kinds that are not read: {names}")
        for source in sources_told:
            if held := _held_out(source):
                say(held)
        rows = ", ".join(f"{name.removesuffix('.rows')} {n:,.0f}" for name, n in counts.items() if ".rows" in name)
        say(f"data.dvc names the new snapshot {dvc.data_version(root)}: {rows}")
        if any(n for name, n in counts.items() if name.endswith(".quarantined")):
            for example in _examples(root / "data" / "quarantine.jsonl"):
                console.print(Text(f"  {example}", style="dim"))
            say("What was turned away is in data/quarantine.jsonl, with file, line and reason.")


def _seen_from(root: Path, source: dict[str, Any]) -> dict[str, Any]:
    """A path as the checkout sees it, so that data.dvc names it alike wherever the command was given."""
    name = source["source"]
    if name in MADE or name.startswith("hf:"):
        return source
    path = Path(name).expanduser().absolute()
    return {**source, "source": path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)}


def _held_out(source: dict[str, Any]) -> str:
    """Said of a source that has rows to learn from, but none that may be learnt from."""
    if source["splits"].get("train") or all(r["table"] == "eval" for r in source["rows"]):
        return ""
    return f"{source['source']}: its files' names say test or val, so no row is for training; --split hash cuts it anew"


def _examples(quarantine: Path) -> list[str]:
    """For each kind of reason the first record: where it stands and what is the matter."""
    first: dict[str, str] = {}
    with quarantine.open("rb") as f:
        for line in f:
            row = json.loads(line)
            first.setdefault(row["reason"].partition(":")[0], f"{row['file']}:{row['line']}: {row['reason']}")
    return list(first.values())


def told(sources: list[dict[str, Any]]) -> Table:
    """What was read of each source, as which shape, and what became of it."""
    table = Table("source", Column("shape", no_wrap=True), "table", "read", "kept", "quarantined", title="Sources")
    for column in table.columns[3:]:
        column.justify = "right"
    for source in sources:
        line = [source["source"], *(f"{source[key]:,}" for key in ("read", "kept", "quarantined"))]
        for r in source["rows"] or [{"shape": "-", "table": "", "rows": ""}]:
            table.add_row(escape(line[0]), r["shape"], f"{r['table']} {r['rows']}", *line[1:])
            line = [""] * len(line)
        for reason, n in source["reasons"].items():
            table.add_row("", Text(reason, style="dim"), "", "", "", Text(f"{n:,}", style="dim"))
    return table
