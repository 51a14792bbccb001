"""How a comparison is shown: tables in the terminal, and one page that opens without network."""

from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from pipelines.charts import Series, line_chart, number
from pipelines.console import console, say
from pipelines.report import templates
from pipelines.report_sources import duration, moment, size, visible

STATES = {"promoted": "green", "held": "red", "failed": "red", "killed": "red", "running": "yellow"}
VERDICTS = {"better": "green", "worse": "red"}
CHARTS = {
    "val_reward": ("Held-out reward", "Mean score of the answers to held-out prompts, by each run's own reward model."),
    "reward": ("Reward", "Mean score of the answers that the run learnt from."),
    "kl": ("KL", "Nats an answer, away from the run's own SFT model."),
}
SHOWN = 3  # prompts in the terminal
LONG = 60  # characters of a recipe's value in the terminal


def print_tables(found: Mapping[str, Any]) -> None:
    runs = found["runs"]
    names = [escape(f"{run['letter']}  {run['title']}") for run in runs]
    console.print(_heads(runs, names))
    if found["recipe"]:
        table = Table("recipe", *names, title="Recipe: what differs")
        for row in found["recipe"]:
            table.add_row(row["key"], *(escape(_short(v)) for v in row["values"]))
        console.print(table)
    else:
        say("No key of the recipes differs.")
    if found["measures"]:
        console.print(_measures(found["measures"], names))
    if found["gates"]:
        table = Table("gate", *names, title="Gates")
        for row in found["gates"]:
            table.add_row(row["name"], *(_judged(g, run) for g, run in zip(row["judged"], runs, strict=True)))
        console.print(table)
        _failed(found)
    _answers(found["samples"], names)
    for note in found["notes"]:
        say(note)
    say(LEAD)


LEAD = (
    "Differences are to A, with 95 % intervals of a paired bootstrap over the rows that both were asked. They say how "
    "sure these models differ on such rows; another seed of the same recipe may move them too."
)


def _heads(runs: list[Mapping[str, Any]], names: list[str]) -> Table:
    table = Table("", *names, title="Runs")
    table.add_row("algorithm", *(f"[bold]{run['algorithm']}[/]" for run in runs))
    table.add_row("state", *(f"[{STATES[run['state']]}]{run['state']}[/]" for run in runs))
    if any(run["reason"] for run in runs):
        table.add_row("why", *(escape(visible(run["reason"])) for run in runs))
    for key in ("recipe", "version", "data", "run"):
        said = [run["run_id"][:8] if key == "run" else run[key] or "–" for run in runs]
        table.add_row(key, *(escape(text[:16]) if key == "data" else escape(text) for text in said))
    table.add_row("started", *(moment(run["started"]) or "–" for run in runs))
    return table


def _measures(measures: list[Mapping[str, Any]], names: list[str]) -> Table:
    columns = [names[0], *(c for name in names[1:] for c in (name, f"{name[0]} − A"))]
    table = Table("measure", *columns, title="Measures")
    for row in measures:
        cells = [_measured(row["values"][0], row["digits"])]
        for value, difference in zip(row["values"][1:], row["differences"][1:], strict=True):
            cells += [_measured(value, row["digits"]), _differs(difference)]
        table.add_row(f"{row['title']} {ARROWS[row['better']]}", *cells)
    return table


ARROWS = {1: "↑", 0: "", -1: "↓"}  # which way is better


def _measured(value: Mapping[str, Any] | None, digits: int) -> str:
    if value is None:
        return "–"
    said = number(value["value"], digits)
    return said if value["low"] is None else f"{said}\n[dim]{span(value)}[/]"


def _differs(found: Mapping[str, Any]) -> str:
    if "why" in found:
        return f"[dim]{escape(found['why'])}[/]"
    colour = VERDICTS.get(found["verdict"], "dim")
    lines = [f"{signed(found['value'])}  [{colour}]{found['verdict']}[/]"]
    lines += [f"[dim]{span(found)}[/]"] if "low" in found else []
    lines += [f"[dim]{found['note']}[/]"] if "note" in found else []
    return "\n".join(lines)


def signed(value: float) -> str:
    return f"{'+' if value > 0 else ''}{number(value, 3)}"


def span(found: Mapping[str, Any]) -> str:
    n = f", n = {number(found['n'])}" if found.get("n") else ""
    return f"{number(found['low'], 3)} to {number(found['high'], 3)}{n}"


def _judged(gate: Mapping[str, Any] | None, run: Mapping[str, Any]) -> str:
    if gate is None:
        return f"[dim]{'no such gate' if run['evaluated'] else 'not judged'}[/]"
    said = "[green]holds[/]" if gate["passed"] else "[red]does not hold[/]"
    return f"{said}  {number(gate['value'])}, {gate['comparison'].replace('_', ' ')} {number(gate['limit'])}"


def _failed(found: Mapping[str, Any]) -> None:
    for row in found["gates"]:
        for run, gate in zip(found["runs"], row["judged"], strict=True):
            if gate and not gate["passed"]:
                say(f"{run['letter']} is held: {gate['reason']}")


def _answers(samples: list[Mapping[str, Any]], names: list[str]) -> None:
    if not samples:
        return
    table = Table("prompt", *names, title=f"Answers to the same held-out prompts, {SHOWN} of {len(samples)}")
    for sample in samples[:SHOWN]:
        table.add_row(escape(visible(sample["prompt"])), *(escape(visible(a["text"])) for a in sample["answers"]))
    console.print(table)


def _short(value: str | None) -> str:
    if value is None:
        return "–"
    return value if len(value) <= LONG else value[: LONG - 1] + "…"


def _reward_by_kl(found: Mapping[str, Any]) -> list[Series]:
    """Held-out reward over the KL of the same step, run by run."""
    both = zip(found["runs"], found["curves"]["kl"], found["curves"]["val_reward"], strict=True)
    series = []
    for run, kl, reward in both:
        at = dict(kl)
        series.append(
            Series(f"{run['letter']} {run['algorithm']}", sorted((at[step], y) for step, y in reward if step in at))
        )
    return series


def page(found: Mapping[str, Any]) -> str:
    """The comparison as one HTML page: no script, no font, nothing to load."""
    charts = []
    for key, (title, note) in CHARTS.items():
        curves = zip(found["runs"], found["curves"][key], strict=True)
        series = [Series(f"{run['letter']} {run['algorithm']}", points) for run, points in curves]
        if any(points for _, points in series):
            charts.append(line_chart(title, series, note))
    bought = _reward_by_kl(found)
    if any(line.points for line in bought):
        note = "What distance bought: steps of different algorithms are not alike, nats are."
        charts.insert(1, line_chart("Held-out reward by KL", bought, note, along="KL"))
    environment = templates()
    environment.filters |= {"span": span, "signed": signed, "moment": moment}
    totals = []
    for i in range(len(found["runs"])):
        spent = [row["values"][i] for row in found["cost"] if row["values"][i]]
        memory = max((s["memory"] or 0 for s in spent), default=0)
        totals.append({"seconds": duration(sum(s["seconds"] or 0 for s in spent)), "memory": size(memory)})
    shown = {"charts": charts, "totals": totals, "arrows": ARROWS, "lead": LEAD}
    return environment.get_template("compare.html.j2").render(found=found, **shown)
