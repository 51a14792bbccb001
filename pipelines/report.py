"""The last run as one HTML file that opens without network: no script, no font, no image to load.

What is read is what the stages and the runner wrote: artifacts/<stage>/, dvc.lock, data.dvc, params.yaml, .forja/. Each
section reads its own files and names those that are missing or damaged, with the mend, as its gaps: a run that ended
early still has a report.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from components.artifact import Record, write_atomic
from components.release.gates import Verdict
from pipelines import dvc
from pipelines import report_sources as sources
from pipelines.charts import Edge, Node, Series, bar, line_chart, lineage_chart, number
from pipelines.identity import STAGES
from pipelines.report_sources import Numbers, read, read_rows, read_yaml

Identities = dict[str, str | None]
Section = dict[str, Any]  # what the template shows under one heading; "gaps" lists what is missing
Spec = tuple[str, str, dict[str, str]]

# Charts: title, what it means, and the keys of curves.jsonl with the names they go by.
TRAININGS: dict[str, list[Spec]] = {
    "pretrain": [("Pretrain · loss", "Nats a token of the corpus.", {"loss": "train", "val_loss": "val"})],
    "sft": [("SFT · loss", "Nats a token of the answer alone.", {"loss": "train", "val_loss": "val"})],
    "reward": [
        ("Reward model · loss", "Bradley-Terry, nats a pair; 0.69 is a coin.", {"loss": "train", "val_loss": "val"}),
        ("Reward model · accuracy", "Share of pairs put right.", {"accuracy": "train", "val_accuracy": "val"}),
    ],
    "referee": [("Referee · accuracy", "A second one, of other pairs.", {"accuracy": "train", "val_accuracy": "val"})],
    "ppo": [  # by whatever algorithm: each draws what it has
        ("policy loss", "The clipped surrogate; it stays near 0 by design.", {"policy_loss": "policy"}),
        ("value loss", "Squared error of the value model.", {"value_loss": "value"}),
        ("loss", "What the algorithm lowers.", {"loss": "train", "val_loss": "val"}),
        (
            "accuracy",
            "Share of preferences that the policy itself puts right.",
            {"accuracy": "train", "val_accuracy": "val"},
        ),
    ],
}
PPO: list[Spec] = [
    ("Reward", "Mean score of the answers by the reward model.", {"reward": "train", "val_reward": "val"}),
    ("KL", "Nats an answer, away from the SFT model.", {"kl": "KL"}),
    ("Entropy", "Nats a token: how open the policy still is.", {"entropy": "entropy"}),
    ("Length", "Tokens an answer.", {"length": "length"}),
    (
        "Unfinished and repeated",
        "Share of answers that never ended, and of 3-grams said before.",
        {"unfinished": "unfinished", "repetition": "repeated"},
    ),
    ("Clip fraction", "Share of tokens whose ratio left the clip range.", {"clip_fraction": "clipped"}),
    ("Explained variance", "Of the returns, by the value model; 1 is perfect.", {"explained_variance": "explained"}),
]
GATES, MEASURED, SIZES = (
    "artifacts/evaluate/gates.json",
    "artifacts/evaluate/metrics.json",
    "artifacts/quantize/metrics.json",
)
# The measures that come first, in this order, and how they are called; the others follow by name.
MEASURES = {
    "bits_per_byte": "bits per byte of held-out text",
    "choice.accuracy": "four-choice accuracy",
    "rougeL": "ROUGE-L",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "bleu": "BLEU",
    "reward": "mean reward",
    "referee_reward": "mean reward by the referee",
    "gain": "reward gained over SFT",
    "referee_gain": "gained by the referee",
    "kl": "KL to SFT, nats an answer",
    "length": "tokens an answer",
    "unfinished": "answers that never end",
}
MODELS = ("xz", "pretrain", "sft", "ppo", "int8", "int4")


def write(root: Path, out: Path) -> Path:
    """Write the report of the checkout `root` to the file `out`, and return `out`."""
    base = Path(os.path.relpath(root.resolve(), out.resolve().parent)).as_posix()
    sections = (head, gates, training, ppo, samples, funnel, quality, lineage, cost, recipe)
    template = templates().get_template("report.html.j2")
    page = template.render({section.__name__: section(root) for section in sections}, base=base)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, page)
    return out


def templates() -> Environment:
    """The pages' templates, which escape what they are given, and what they say numbers and texts by."""
    environment = Environment(loader=PackageLoader("pipelines"), autoescape=True, undefined=StrictUndefined)
    environment.filters |= {
        "number": number,
        "size": sources.size,
        "duration": sources.duration,
        "visible": sources.visible,
    }
    environment.globals["bar"] = bar
    return environment


def head(root: Path) -> Section:
    """What a reader wants first: may this model be used, which is it, from which data and recipe, since when."""
    gaps: list[str] = []
    _, run = sources.last_run(root, gaps)
    judged = read(root, GATES, Verdict, [])
    measured = read(root, MEASURED, Numbers, []) or {}
    small = read(root, SIZES, Numbers, []) or {}
    params = read_yaml(root, "params.yaml", gaps)
    promote = params.get("promote")
    facts = {
        "Gates held": f"{sum(g.passed for g in judged.gates)} of {len(judged.gates)}" if judged else "–",
        "Bits per byte": number(measured.get("pretrain.bits_per_byte")),
        "Pairs put right": sources.percent(measured.get("reward.accuracy")),
        f"Reward gained by {algorithm(root)}": number(measured.get("ppo.gain"), 3),
        "int8 weights": sources.size(small.get("int8.bytes")),
        "The run took": sources.duration(run.ended - run.started if run.ended and run.started else None),
    }
    if run.dvc_lock and run.dvc_lock != dvc.lock_hash(root):
        gaps.append("dvc.lock: changed since the last `forja run`, whose verdict this is; run it again")
    return {
        "verdict": run.verdict or (judged.verdict if judged else None),
        "reason": run.reason,
        "version": run.model_version,
        "registered": promote if isinstance(promote, dict) else {},
        "recipe": run.recipe or params.get("recipe"),
        "data": sources.data_version(root, gaps),
        "when": sources.moment(run.ended or run.started),
        "facts": {name: fact for name, fact in facts.items() if fact != "–"},
        "gaps": gaps,
    }


def gates(root: Path) -> Section:
    gaps: list[str] = []
    return {"judged": read(root, GATES, Verdict, gaps), "gaps": gaps}


def training(root: Path) -> Section:
    """The loss of the trainings by step, and how well the reward model knows what it knows."""
    gaps: list[str] = []
    rows = {stage: read_rows(root, f"artifacts/{stage}/curves.jsonl", Numbers, gaps) for stage in TRAININGS}
    named = {"ppo": f"{algorithm(root)} · "}
    charts = [
        chart(rows[stage], f"{named.get(stage, '')}{title}", note, keys)
        for stage, specs in TRAININGS.items()
        for title, note, keys in _drawn(rows[stage], specs)
    ]
    bins = read(root, "artifacts/reward/calibration.json", list[sources.Bin], gaps)
    return {"charts": [*charts, *([calibration(bins)] if bins else [])], "gaps": gaps}


def calibration(bins: list[sources.Bin]) -> Markup:
    """The share of held-out verdicts that is right by how sure the reward model is of them, in percent."""
    right = [(float(round(100 * b.confidence)), 100 * b.value) for b in bins]
    series = [Series("right", right), Series("as sure as right", [(x, x) for x, _ in right])]
    n = sum(b.n for b in bins)
    note = f"Of {n} held-out verdicts: the share that is right by the probability that the model gives it, in %."
    return line_chart("Reward model · calibration", series, note, along="confidence %")


def ppo(root: Path) -> Section:
    gaps: list[str] = []
    rows = read_rows(root, "artifacts/ppo/curves.jsonl", Numbers, gaps)
    alarms = read(root, "artifacts/ppo/alarms.json", list[sources.Alarm], gaps)
    charts = [chart(rows, *spec) for spec in _drawn(rows, PPO)]
    said = sources.confirmed(read(root, MEASURED, Numbers, []) or {})
    return {"algorithm": algorithm(root), "charts": charts, "alarms": alarms, "referee": said, "gaps": gaps}


def algorithm(root: Path) -> str:
    """That of the stage `ppo`, by the result that lies here or else by the recipe in force."""
    record = read(root, "artifacts/ppo/record.json", Record, [])
    section = record.config if record else read_yaml(root, "params.yaml", []).get("ppo")
    return str(section.get("algorithm", "ppo") if isinstance(section, dict) else "ppo").upper()


def _drawn(rows: list[Numbers], specs: list[Spec]) -> list[Spec]:
    """The charts of which the curves hold anything."""
    known = {key for row in rows for key, value in row.items() if value is not None}
    return [spec for spec in specs if known & spec[2].keys()]


def chart(rows: list[Numbers], title: str, note: str, keys: Mapping[str, str]) -> Markup:
    """A line chart of some keys of the curves; a row without a key has no point on its line."""

    def points(key: str) -> list[tuple[float, float]]:
        return [(x, y) for r in rows if (x := r.get("step")) is not None and (y := r.get(key)) is not None]

    return line_chart(title, [Series(name, points(key)) for key, name in keys.items()], note)


def samples(root: Path) -> Section:
    """For each prompt what the stages answer, side by side, and apart from them what only one stage was asked."""
    gaps: list[str] = []
    asked: dict[str, Section] = {}

    def put(prompt: str, reference: str | None, texts: Mapping[str, str | None]) -> None:
        entry = asked.setdefault(prompt, {"prompt": prompt, "reference": None, "texts": {}})
        entry["texts"] = {stage: text for stage, text in texts.items() if text is not None} | entry["texts"]
        entry["reference"] = entry["reference"] or reference

    for stage in ("pretrain", "sft", "ppo"):
        for row in read_rows(root, f"artifacts/{stage}/samples.jsonl", sources.Sample, gaps):
            put(row.prompt, row.reference, {stage: row.text})
    judged = read_rows(root, "artifacts/evaluate/rows.jsonl", sources.Row, gaps)
    for answers in judged:
        if answers.part == "quality":
            put(answers.prompt, answers.reference, {s: getattr(answers, s) for s in ("pretrain", "sft", "ppo")})
    shared = sorted((e for e in asked.values() if len(e["texts"]) > 1), key=lambda e: -len(e["texts"]))
    alone = [e for e in asked.values() if len(e["texts"]) == 1]
    return {"shared": shared, "alone": alone, "scored": [r for r in judged if r.part == "gain"], "gaps": gaps}


def funnel(root: Path) -> Section:
    """What was read of each source; how many rows came in, which were turned away and why, and whose the kept are."""
    gaps: list[str] = []
    tables = read(root, "artifacts/validate/funnel.json", dict[str, sources.Table], gaps) or {}
    docs = "artifacts/validate/docs/index.html"
    if not (root / docs).is_file():
        gaps.append(f"{docs}: not made yet; run `forja run`")
    ingested = read(root, "artifacts/validate/sources.json", dict[str, sources.Ingested], gaps) or {}
    tokens = read(root, "artifacts/tokenize/metrics.json", Numbers, gaps) or {}
    by_lang = {key.removeprefix("bytes_per_token."): value for key, value in tokens.items() if "token." in key}
    return {
        "tables": tables,
        "ingested": ingested,
        "taken": read(root, "data/sources.json", list[sources.Source], gaps) or [],
        "bytes_per_token": dict(sorted(by_lang.items())),
        "sources": sources.total(t.sources for t in tables.values()),
        "licences": sources.total(t.licences for t in tables.values()),
        "docs": docs if (root / docs).is_file() else None,
        "gaps": gaps,
    }


def quality(root: Path) -> Section:
    """Measures by model, the measures that have no model, and the quantized files."""
    gaps: list[str] = []
    measured = read(root, MEASURED, Numbers, gaps) or {}
    sizes = read(root, SIZES, Numbers, gaps) or {}
    table: dict[str, dict[str, tuple[str, str]]] = {}
    other: dict[str, tuple[str, str]] = {}
    for key, value in sorted(measured.items()):
        owned = key if key.partition(".")[0] not in ("choice", "bias") else f"ppo.{key}"  # both are asked of the policy
        model, _, measure = owned.partition(".")
        if measure.rpartition(".")[2] in ("low", "high", "n") or measure.endswith("_ratio"):
            continue
        said = (number(value), sources.interval(measured, key))
        if model in MODELS:
            table.setdefault(measure, {})[model] = said
        else:
            other[key] = said
    files = [
        {
            "name": name,
            "bytes": sizes.get(f"{name}.bytes"),
            "bytes_ratio": sizes.get(f"{name}.bytes_ratio"),
            "bits": sizes.get(f"{name}.bits_per_weight"),
            "error": sizes.get(f"{name}.weight_error.torchao"),
            "bits_per_byte": measured.get(f"{'ppo' if name == 'full' else name}.bits_per_byte"),
            "bits_per_byte_ratio": measured.get(f"{name}.bits_per_byte_ratio"),
        }
        for name in ("full", "int8", "int4")
        if f"{name}.bytes" in sizes
    ]
    table = {MEASURES.get(m, m): table[m] for m in sorted(table, key=_place)}
    models = [m for m in MODELS if any(m in row for row in table.values())]
    return {"models": models, "table": table, "other": other, "files": files, "gaps": gaps}


def _place(measure: str) -> tuple[int, str]:
    known = list(MEASURES)
    return (known.index(measure) if measure in known else len(known), measure)


def lineage(root: Path) -> Section:
    """From the data version to the model version: what went into what, and every identity on the way.

    An edge is true while its source is still what the target was made from.
    """
    gaps: list[str] = []
    run_id, run = sources.last_run(root, [])
    lock = read_yaml(root, "dvc.lock", gaps).get("stages")
    entries = lock if isinstance(lock, dict) else {}
    names = ["data", *STAGES, "model"]
    rows: list[Identities] = []
    edges: list[Edge] = []
    for target, stage in enumerate(names[:-1]):
        record = read(root, f"{sources.folder_of(stage)}/record.json", Record, gaps)
        made = sources.stage_run(root, "ingest" if stage == "data" else stage, record, gaps)
        entry = entries.get(stage)
        locked = sources.md5(entry.get("outs")) if isinstance(entry, dict) else None
        row = {"dvc": sources.data_version(root, []) if stage == "data" else locked}
        row |= {"fingerprint": record.fingerprint if record else None, "mlflow": made.mlflow_run_id}
        rows.append({"name": stage, **row, "prefect": made.prefect_flow_run_id})
        for name, recorded in (record.inputs if record else {}).items():
            if name in names[:target]:
                same = sources.same(root / sources.folder_of(name), recorded)
                edges.append(Edge(names.index(name), target, same))
    rows.append({"name": "model", "version": str(run.model_version) if run.model_version is not None else None})
    if run.model_version is not None:
        edges += [Edge(names.index(stage), len(names) - 1, True) for stage in ("quantize", "evaluate")]
    picture = lineage_chart([_node(row) for row in rows], edges)
    return {"picture": picture, "rows": rows, "run_id": run_id, "mlflow": run.mlflow_run_id, "gaps": gaps}


def _node(row: Identities) -> Node:
    shown = [f"{key} {row[key]:.16}" for key in ("dvc", "fingerprint", "mlflow", "version") if row.get(key)]
    return Node(str(row["name"]), "   ".join(shown) or "not made yet", bool(shown))


def cost(root: Path) -> Section:
    """Seconds and memory that each stage's result took to make, and whether the last run made it."""
    gaps: list[str] = []
    _, run = sources.last_run(root, [])
    states = {stage.name: stage.state for stage in run.stages}
    rows = []
    for stage in ("ingest", *STAGES):
        record = read(root, f"{sources.folder_of(stage)}/record.json", Record, [])
        made = sources.stage_run(root, stage, record, gaps)
        memory = made.peak_memory_mb * 2**20 if made.peak_memory_mb is not None else None
        rows.append({"name": stage, "state": states.get(stage), "seconds": made.seconds, "memory": memory})
    return {
        "rows": rows,
        "total": sum(row["seconds"] or 0 for row in rows),
        "slowest": max(row["seconds"] or 0 for row in rows),
        "largest": max(row["memory"] or 0 for row in rows),
        "gaps": gaps,
    }


def recipe(root: Path) -> Section:
    """params.yaml as it stands."""
    path = root / "params.yaml"
    if not path.is_file():
        return {"text": None, "gaps": ["params.yaml: not made yet; run `forja use conf/demo.yaml`"]}
    return {"text": path.read_text(encoding="utf-8", errors="replace"), "gaps": []}
