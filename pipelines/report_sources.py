"""What the report reads, and how it says it: files that may be missing or damaged become a value and a line.

Every reader takes `gaps` and adds one line to it (file, reason, mend) for what it could not read; none raises.
"""

import math
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from components.artifact import Damaged, ForjaError, Record, digest
from pipelines import dvc
from pipelines.charts import number

T = TypeVar("T")
Numbers = dict[str, float | None]
Unix = Annotated[float, Field(ge=0, lt=253402300800)]  # seconds; datetime ends with the year 9999


class Table(BaseModel):
    """One table's part of the funnel: read = kept + the sum of rejected."""

    read: int
    kept: int
    rejected: dict[str, int]
    splits: dict[str, int]
    sources: dict[str, int]
    licences: dict[str, int]


class Source(BaseModel):
    """One entry of data/sources.json: what was read, where it came from, and under which licences the kept rows are."""

    source: str
    given: str = Field(alias="from")
    files: int
    read: int
    kept: int
    quarantined: int
    licences: dict[str, int]


class Ingested(BaseModel):
    """One source's records: read = kept + quarantined."""

    read: int
    kept: int
    quarantined: int
    reasons: dict[str, int]


class Sample(BaseModel):
    prompt: str
    text: str
    reference: str | None = None


class Bin(BaseModel):
    """Held-out verdicts of the reward model of about one confidence, and the share of them that is right."""

    confidence: float
    value: float
    n: int


class Alarm(BaseModel):
    """What PPO found wrong with itself, and when."""

    step: int
    text: str


class Row(BaseModel):
    """A row of evaluate's rows.jsonl; those of the parts `quality` and `gain` hold answers."""

    part: str
    prompt: str = ""
    reference: str | None = None
    pretrain: str | None = None
    sft: str | None = None
    ppo: str | None = None
    sft_reward: float | None = Field(None, alias="sft.reward")
    ppo_reward: float | None = Field(None, alias="ppo.reward")


class StageRun(BaseModel):
    """.forja/stages/<stage>-<fingerprint>/run.json: when and where, never part of an artifact."""

    seconds: float | None = None
    peak_memory_mb: float | None = None
    mlflow_run_id: str | None = None
    prefect_flow_run_id: str | None = None


class RunStage(BaseModel):
    name: str
    state: str


class Run(BaseModel):
    """.forja/runs/<flow run id>.json: one `forja run`."""

    recipe: str | None = None
    started: Unix | None = None
    ended: Unix | None = None
    reason: str = ""  # why it stopped or held
    stages: list[RunStage] = []
    verdict: str | None = None
    model_version: int | str | None = None
    mlflow_run_id: str | None = None
    dvc_lock: str | None = None


def folder_of(stage: str) -> str:
    """Where a stage's result lies in the checkout."""
    return "data" if stage in ("data", "ingest") else f"artifacts/{stage}"


def read(root: Path, name: str, kind: type[T], gaps: list[str]) -> T | None:
    """The JSON file `name` of the checkout, in the shape of `kind`."""
    try:
        return TypeAdapter(kind).validate_json((root / name).read_bytes())
    except FileNotFoundError:
        gaps.append(f"{name}: not made yet; run `forja run`")
    except (OSError, ValidationError) as e:
        gaps.append(damaged(name, e))
    return None


def read_rows(root: Path, name: str, kind: type[T], gaps: list[str]) -> list[T]:
    """The rows of a JSONL file. A damaged row is counted and passed over."""
    try:
        lines = (root / name).read_bytes().split(b"\n")
    except FileNotFoundError:
        gaps.append(f"{name}: not made yet; run `forja run`")
        return []
    except OSError as e:
        gaps.append(damaged(name, e))
        return []
    adapter, rows, bad = TypeAdapter(kind), [], 0
    for line in lines:
        try:
            rows += [adapter.validate_json(line)] if line else []
        except ValidationError:
            bad += 1
    if bad:
        gaps.append(f"{name}: {bad} rows are not readable and left out; delete {mend(name)}")
    return rows


def read_yaml(root: Path, name: str, gaps: list[str]) -> dict[str, Any]:
    """A YAML mapping of the checkout."""
    if not (root / name).is_file():
        gaps.append(f"{name}: not made yet; run `forja run`")
        return {}
    try:
        return dvc.read_yaml(root / name)
    except (OSError, ForjaError) as e:
        gaps.append(f"{name}: not readable ({visible(str(e))}); restore it from git or run `forja run`")
        return {}


def data_version(root: Path, gaps: list[str]) -> str | None:
    """DVC's hash of the data snapshot, as data.dvc names it."""
    return md5(read_yaml(root, "data.dvc", gaps).get("outs"))


def damaged(name: str, error: Exception) -> str:
    reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else type(error).__name__
    return f"{name}: not readable ({reason}); delete {mend(name)}"


def mend(name: str) -> str:
    """What to delete so that the next run makes a damaged file again."""
    parts = name.split("/")
    return f"{'/'.join(parts[:2]) if parts[0] == 'artifacts' else name} and run `forja run`"


def md5(outs: Any) -> str | None:
    """The hash of the first of DVC's `outs`, None in whatever else may stand there."""
    first = outs[0] if isinstance(outs, list) and outs else None
    value = first.get("md5") if isinstance(first, dict) else None
    return value if isinstance(value, str) else None


def last_run(root: Path, gaps: list[str]) -> tuple[str | None, Run]:
    """The id and the summary of the run that started last; an empty one where there is none."""
    names = sorted(p.relative_to(root).as_posix() for p in (root / ".forja/runs").glob("*.json"))
    found = [(name, run) for name in names if (run := read(root, name, Run, gaps))]
    if not found:
        gaps.append(".forja/runs: no run of the flow is known here; run `forja run`")
        return None, Run()
    name, run = max(found, key=lambda item: item[1].started or 0.0)
    return Path(name).stem, run


def stage_run(root: Path, stage: str, record: Record | None, gaps: list[str]) -> StageRun:
    """When and where the result of `stage` that lies here was made."""
    if record is None:
        return StageRun()
    name = f".forja/stages/{stage}-{record.fingerprint}/run.json"
    if not (root / name).is_file():
        gaps.append(f"{stage}: made in another checkout or restored from the cache; its time and run ids are not here")
        return StageRun()
    return read(root, name, StageRun, gaps) or StageRun()


def same(folder: Path, recorded: str) -> bool:
    """Whether `folder` is still the one with this digest."""
    try:
        return digest(folder) == recorded
    except (OSError, Damaged):
        return False


def total(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """The sum of counts, the largest first."""
    summed: Counter[str] = Counter()
    for part in counts:
        summed.update(part)
    return dict(sorted(summed.items(), key=lambda item: (-item[1], item[0])))


def visible(text: str) -> str:
    """Text with control and other unseen characters written out as ⟨U+202E⟩; line feeds and tabs stay."""
    hidden = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
    return "".join(f"⟨U+{ord(c):04X}⟩" if unicodedata.category(c) in hidden and c not in "\n\t" else c for c in text)


def size(n_bytes: float | None) -> str:
    """Bytes for reading: 812 B, 3.4 MB."""
    if n_bytes is None or not math.isfinite(n_bytes):
        return "–"
    power = 0 if n_bytes < 1000 else min(4, int(math.log10(n_bytes) / 3))
    return f"{n_bytes / 1000**power:.{1 if power else 0}f} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def duration(seconds: float | None) -> str:
    """Seconds for reading: 0.8 s, 42 s, 3 min 05 s, 2 h 10 min."""
    if seconds is None or not math.isfinite(seconds):
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def percent(share: float | None) -> str:
    return "–" if share is None or not math.isfinite(share) else f"{100 * share:.1f} %"


def moment(unix: float | None) -> str | None:
    """A time for reading, in UTC."""
    return f"{datetime.fromtimestamp(unix, UTC):%-d %B %Y, %H:%M} UTC" if unix else None


def interval(metrics: Numbers, key: str) -> str:
    """How sure `key` is: the metrics `key`.low, .high and .n, or those of the group whose share or mean it is."""
    parent, _, measure = key.rpartition(".")
    parent = parent if measure in ("accuracy", "mean") and f"{key}.low" not in metrics else key
    low, high, n = (metrics.get(f"{parent}.{end}") for end in ("low", "high", "n"))
    span = f"{number(low, 3)} to {number(high, 3)}" if low is not None and high is not None else ""
    return ", ".join(part for part in (span, f"n = {number(n)}" if n else "") if part)


def confirmed(measured: Numbers) -> str:
    """In words, whether the referee, a reward model of other rows, sees what the policy gained by the first."""
    low, other_low = measured.get("ppo.gain.low"), measured.get("ppo.referee_gain.low")
    if low is None or other_low is None:
        return ""
    by = [f"{number(measured.get(k), 3)} ({interval(measured, k)})" for k in ("ppo.gain", "ppo.referee_gain")]
    said = f"On held-out prompts the policy gained {by[0]} by the reward model it learnt from, and {by[1]} by the "
    said += "referee, a second one that learnt from other rows: "
    if low <= 0:
        return said + "nothing is sure to have been gained."
    if other_low > 0:
        return said + "the gain is more than a weakness of the first."
    return (
        said + "the referee does not confirm it. The policy may have learnt what pleases the first rather than what is "
        "better (reward hacking): raise kl_coef, train for fewer steps, or give the reward model more pairs."
    )
