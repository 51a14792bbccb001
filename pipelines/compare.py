"""`forja compare A B ...`: runs side by side, each held against the first.

A difference is stated with its 95 % interval, from a paired bootstrap over the rows that both runs were asked, or not
at all: where the rows, the judge or the way of asking differ, the reason stands in its place.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from components.artifact import ForjaError, to_json, write_atomic
from components.stats import bootstrap_mean
from pipelines.recorded import Recorded, Registry, Row, Stage, read

RESAMPLES = 2000
FEW = 10  # rows, below which a bootstrap does not tell
MOST = 6  # runs that a page can show
LETTERS = "ABCDEF"
ASKING = ("max_new_tokens", "temperature")  # keys of evaluate that change what a row's value means
Compared = dict[str, Any]


class Measure(NamedTuple):
    """A metric of evaluate: what it is called, which way is better, whose it is, and the value of a row behind it.

    Without a row's value it is `exact` (a count or a size) or one number of a whole text.
    """

    key: str
    title: str
    better: Literal[1, 0, -1]
    stage: str  # whose result it measures
    part: str = ""
    value: Callable[[Row], float | None] | None = None
    judge: str = ""  # the stage whose model must be the same for two values to be on one scale
    exact: bool = False
    digits: int = 4


def _right(scores: str, row: Row) -> float | None:
    """1 where the right choice alone scored highest, else 0; as evaluate counts it."""
    if scores not in row:
        return None
    own = row[scores][row["answer"]]
    return float(all(own > other for i, other in enumerate(row[scores]) if i != row["answer"]))


def _gain(score: str, row: Row) -> float | None:
    ours, theirs = (_field(f"{model}.{score}", row) for model in ("ppo", "sft"))
    return None if ours is None or theirs is None else ours - theirs


def _bias(kind: str, row: Row) -> float | None:
    return abs(row["difference"]) if kind in ("", row.get("kind")) and "difference" in row else None


def _field(name: str, row: Row) -> float | None:
    value = row.get(name)
    return float(value) if isinstance(value, int | float) else None


MEASURES = [
    Measure("ppo.gain", "reward gained over SFT", 1, "ppo", "gain", partial(_gain, "reward"), judge="reward"),
    Measure(
        "ppo.referee_gain", "gain, by the referee", 1, "ppo", "gain", partial(_gain, "referee_reward"), judge="referee"
    ),
    Measure("ppo.reward", "mean reward", 1, "ppo", "gain", partial(_field, "ppo.reward"), judge="reward"),
    Measure("ppo.kl", "KL to SFT, nats an answer", -1, "ppo", "gain", partial(_field, "kl")),
    Measure("choice.accuracy", "four-choice accuracy", 1, "ppo", "choice", partial(_right, "choice")),
    Measure("ppo.rougeL", "ROUGE-L", 1, "ppo", "quality", partial(_field, "ppo.rougeL")),
    Measure("ppo.bleu", "BLEU", 1, "ppo"),
    Measure("ppo.unfinished", "answers that never end", -1, "ppo"),
    Measure("ppo.bits_per_byte", "bits per byte", -1, "ppo", digits=5),
    Measure("sft.bits_per_byte", "bits per byte, SFT", -1, "sft", digits=5),
    Measure("pretrain.bits_per_byte", "bits per byte, base model", -1, "pretrain", digits=5),
    Measure("reward.accuracy", "reward model, pairs put right", 1, "reward", "preference", partial(_field, "right")),
    Measure(
        "referee.accuracy", "referee, pairs put right", 1, "referee", "preference", partial(_field, "referee.right")
    ),
    Measure("bias.mean", "bias, mean difference", -1, "ppo", "bias", partial(_bias, "")),
    *(
        Measure(f"bias.{kind}.mean", f"bias, {kind}", -1, "ppo", "bias", partial(_bias, kind))
        for kind in ("gender", "race", "religion")
    ),
    Measure("int8.bits_per_byte_ratio", "int8, bits per byte of full", -1, "quantize", digits=5),
    Measure("int4.bits_per_byte_ratio", "int4, bits per byte of full", -1, "quantize", digits=5),
    Measure("int8.bytes_ratio", "int8, bytes of full", -1, "quantize", exact=True),
    Measure("int4.bytes_ratio", "int4, bytes of full", -1, "quantize", exact=True),
    Measure("contamination.rows", "contaminated rows", -1, "validate", exact=True),
]


def collect(root: Path, names: list[str]) -> Compared:
    """Read the named runs and compare them. Raises ForjaError where a name means no run, or two the same."""
    registry = Registry(root)
    if not 2 <= len(names) <= MOST:
        raise ForjaError(f"compare: name 2 to {MOST} runs, not {len(names)}; known: {registry.known()}")
    runs = [read(registry, name) for name in names]
    for i, run in enumerate(runs):
        for other in runs[:i]:
            if run.run_id == other.run_id:
                raise ForjaError(f"compare: {other.asked} and {run.asked} are one run, {run.run_id[:8]}; name another")
    return compare(runs)


def compare(runs: list[Recorded]) -> Compared:
    """All that is shown, as plain data: lists run by run, the first of which the others are held against."""
    measures = [shown for m in MEASURES if (shown := _measured(m, runs))]
    return {
        "runs": [_head(letter, run) for letter, run in zip(LETTERS, runs, strict=False)],
        "recipe": differing(runs),
        "measures": measures,
        "others": _others(runs),
        "training": _training(runs),
        "cost": _cost(runs),
        "gates": _gates(runs),
        "curves": {key: [run.curves.get(key, []) for run in runs] for key in ("val_reward", "reward", "kl")},
        "samples": samples(runs),
        "notes": _notes(runs),
    }


def _head(letter: str, run: Recorded) -> Compared:
    evaluated = run.stages.get("evaluate")
    kept = ("asked", "run_id", "recipe", "state", "reason", "version", "data", "started", "where", "algorithm", "gaps")
    whole = evaluated is not None and evaluated.status == "FINISHED"
    title = f"version {run.asked}" if run.asked.isdigit() and run.version else run.asked
    title = title[:8] if run.run_id == title else title
    return {"letter": letter, "title": title, **{key: getattr(run, key) for key in kept}, "evaluated": whole}


def differing(runs: list[Recorded]) -> list[Compared]:
    """The keys of the recipes that are not the same in all runs. A key that a run's recipe lacks is None.

    Where a run did not keep its whole recipe, the sections of the stages that all reached are compared.
    """
    params = [run.params if all(r.whole for r in runs) else _by_stage(run) for run in runs]
    if not all(run.whole for run in runs):
        reached = set.intersection(*({key.partition(".")[0] for key in p} for p in params))
        params = [{key: v for key, v in p.items() if key.partition(".")[0] in reached} for p in params]
    keys = dict.fromkeys(key for p in params for key in p)
    values = {key: [str(p[key]) if key in p else None for p in params] for key in keys if key != "recipe"}
    return [{"key": key, "values": found} for key, found in values.items() if len(set(found)) > 1]


def _by_stage(run: Recorded) -> dict[str, str]:
    return {f"{name}.{key}": value for name, stage in run.stages.items() for key, value in stage.params.items()}


def _measured(measure: Measure, runs: list[Recorded]) -> Compared | None:
    """One measure over all runs; None where no run has it."""
    values = [_value(measure.key, run.metrics) for run in runs]
    if not any(values):
        return None
    differences = [None, *(_difference(measure, runs[0], run) for run in runs[1:])]
    facts = {key: getattr(measure, key) for key in ("key", "title", "better", "digits")}
    return {**facts, "values": values, "differences": differences}


def _value(key: str, metrics: Mapping[str, float]) -> Compared | None:
    """The metric with its interval, which is that of its own name or of the group whose share or mean it is."""
    if key not in metrics:
        return None
    parent, _, last = key.rpartition(".")
    parent = parent if last in ("accuracy", "mean") and f"{key}.low" not in metrics else key
    return {"value": metrics[key], **{end: metrics.get(f"{parent}.{end}") for end in ("low", "high", "n")}}


def _difference(measure: Measure, first: Recorded, run: Recorded) -> Compared:
    """`run` minus `first` with its interval, where it has one, and the verdict; or why there is none."""
    before, after = (r.metrics.get(measure.key) for r in (first, run))
    if before is None or after is None:
        return {"why": "not measured in both"}
    if measure.exact:
        return {"value": after - before, "verdict": _verdict(measure, after - before, after - before)}
    if measure.value is None:
        same = _same(first.stages.get(measure.stage), run.stages.get(measure.stage))
        return {"why": "the same model" if same and after == before else "no rows to tell by"}
    if why := _unlike(measure, first, run):
        return {"why": f"not comparable: {why}"}
    return _paired(measure, first, run)


def _unlike(measure: Measure, first: Recorded, run: Recorded) -> str:
    """Why the same row's two values are not on one scale, or nothing."""
    if measure.judge and (why := _other(measure.judge, first, run)):
        return why
    if measure.part in ("gain", "quality"):
        for key in (f"evaluate.{k}" for k in ASKING):
            before, after = (str(r.params.get(key)) for r in (first, run))
            if before != after:
                return f"{key} is {before} and {after}"
    if measure.part in ("choice", "preference") and not _same_text(first, run):
        return "other data, and these rows keep no text to tell by"
    return ""


def _same(a: Stage | None, b: Stage | None) -> bool:
    """Whether two stages made the same: by their weights where both are noted, else by all that is recorded."""
    if a is None or b is None:
        return False
    return a.run_id == b.run_id or (a.weights == b.weights if a.weights and b.weights else a.digest == b.digest != "")


def _other(name: str, first: Recorded, run: Recorded) -> str:
    """Why the models of a stage are not the same, or nothing."""
    a, b = (r.stages.get(name) for r in (first, run))
    if a is None or b is None:
        return f"no {name} model is recorded"
    if _same(a, b):
        return ""
    return f"another {name} model" if a.weights and b.weights else f"perhaps another {name} model: no weights are noted"


def _same_text(a: Recorded, b: Recorded) -> bool:
    """Whether a row's id means the same text in both: it stands in the snapshot, and validate may redact it."""
    redacted = [r.params.get("validate.pii") for r in (a, b)]
    return _same(a.stages.get("validate"), b.stages.get("validate")) or (
        a.data == b.data != "" and redacted[0] == redacted[1]
    )


def _paired(measure: Measure, first: Recorded, run: Recorded) -> Compared:
    before, after = (_rows(measure, r) for r in (first, run))
    if not before or not after:
        return {"why": "not comparable: no rows recorded"}
    both = [key for key in before if key in after]
    if len(both) < 2:
        return {"why": f"not comparable: other rows ({len(both)} of {len(before)} and {len(after)} in both)"}
    found = bootstrap_mean([after[key] - before[key] for key in both], RESAMPLES, seed=0)
    if not math.isfinite(found.low):
        return {"why": "not comparable: a row's value is not a number"}
    verdict = _verdict(measure, found.low, found.high) if len(both) >= FEW else "too few rows to tell"
    whole = len(both) == len(before) == len(after)
    note = {} if whole else {"note": f"other rows: on the {len(both)} in both, of {len(before)} and {len(after)}"}
    return {**found._asdict(), "verdict": verdict, **note}


def _rows(measure: Measure, run: Recorded) -> dict[str, float]:
    """{what the row asks: its value}. A row is the same where its id and every text it keeps of the question are."""
    found = {}
    for row in run.rows:
        if row.get("part") == measure.part and measure.value and (value := measure.value(row)) is not None:
            asked = ("id", "prompt", "reference", "answer", "kind", "template", "groups", "lang")
            found[repr([row.get(key) for key in asked])] = value
    return found


def _verdict(measure: Measure, low: float, high: float) -> str:
    if low == high == 0:
        return "no difference"
    if low <= 0 <= high or not measure.better:
        return "no clear difference"
    return "better" if (low > 0) == (measure.better > 0) else "worse"


def _others(runs: list[Recorded]) -> list[Compared]:
    """The metrics that are no measure above, nor the interval of one, run by run."""
    taken = {m.key for m in MEASURES}
    keys = sorted({key for run in runs for key in run.metrics} - taken)
    plain = [k for k in keys if k.rpartition(".")[2] not in ("low", "high", "n") and not k.startswith("perf/")]
    return [{"key": key, "values": [_value(key, run.metrics) for run in runs]} for key in plain]


def _training(runs: list[Recorded]) -> list[Compared]:
    """What the stage `ppo` said at its end, by whatever algorithm: one may know what another does not."""
    ends = [run.stages["ppo"].metrics if "ppo" in run.stages else {} for run in runs]
    keys = sorted({key for end in ends for key in end if not key.startswith(("perf/", "final."))})
    return [{"key": key, "values": [end.get(key) for end in ends]} for key in keys]


def _cost(runs: list[Recorded]) -> list[Compared]:
    """Seconds and peak bytes by stage; `same` where a run took the first one's result."""
    names = dict.fromkeys(name for run in runs for name in run.stages)

    def of(run: Recorded, name: str) -> Compared | None:
        if name not in run.stages:
            return None
        stage, first = run.stages[name], runs[0].stages.get(name)
        memory = stage.metrics.get("perf/peak_memory_mb")
        spent = {"seconds": stage.metrics.get("perf/seconds"), "memory": memory and memory * 2**20}
        return {**spent, "same": run is not runs[0] and first is not None and first.run_id == stage.run_id}

    return [{"stage": name, "values": [of(run, name) for run in runs]} for name in names]


def _gates(runs: list[Recorded]) -> list[Compared]:
    by_name = [{gate["name"]: gate for gate in run.gates} for run in runs]
    names = dict.fromkeys(name for gates in by_name for name in gates)
    return [{"name": name, "judged": [gates.get(name) for gates in by_name]} for name in names]


def samples(runs: list[Recorded]) -> list[Compared]:
    """The answers of the trained models to the prompts that every run was asked, in the order of the first's rows."""
    asked = [
        {(row["part"], row["id"], row["prompt"]): row for row in run.rows if "prompt" in row and "ppo" in row}
        for run in runs
    ]
    found = []
    for key, row in asked[0].items():
        rows = [rows[key] for rows in asked if key in rows]
        if len(rows) == len(runs):
            answers = [{"text": r["ppo"], "reward": r.get("ppo.reward"), "rougeL": r.get("ppo.rougeL")} for r in rows]
            question = {"part": key[0], "id": key[1], "prompt": key[2], "reference": row.get("reference")}
            found.append({**question, "answers": answers})
    return found


def _notes(runs: list[Recorded]) -> list[str]:
    """What a reader must know before he trusts a number here."""
    first, notes = runs[0], []
    for letter, run in zip(LETTERS[1:], runs[1:], strict=False):
        for name, then in (
            ("sft", "reward gained and KL are each over its own"),
            ("reward", "rewards have no one scale"),
        ):
            if name in first.stages and name in run.stages and (why := _other(name, first, run)):
                notes.append(f"{letter}: {why}; then {then}")
        judges = [str(r.params.get("ppo.judge", "model")) for r in (first, run)]
        if judges[0] != judges[1]:
            notes.append(
                f"{letter}: its judge is {judges[1]}, A's is {judges[0]}: the curves of reward are not on one scale"
            )
        codes = [r.stages["evaluate"].code for r in (first, run) if "evaluate" in r.stages]
        if len(set(codes)) > 1:
            notes.append(f"{letter}: evaluated by other code than A, so a metric may be computed otherwise")
        if first.data != run.data:
            notes.append(f"{letter}: other data than A")
        if first.where != run.where:
            notes.append(f"{letter}: made elsewhere than A ({run.where}, {first.where}), so seconds are not comparable")
    return notes + [f"{letter}: {gap}" for letter, run in zip(LETTERS, runs, strict=False) for gap in run.gaps]


def show(root: Path, names: list[str], as_json: Path | None, html: Path | None) -> None:
    """Write the comparison to the files that are named, and print it."""
    from pipelines.compare_page import page, print_tables
    from pipelines.console import say

    found = collect(root, names)
    files = [(path, form) for path, form in ((as_json, to_json), (html, page)) if path]
    for path, form in files:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, form(found))
    print_tables(found)
    for path, _ in files:
        say(f"{path}")
