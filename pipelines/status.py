"""What stands in the checkout, and what a run would do. Reads only."""

import json
import os
from pathlib import Path
from typing import Any

import psutil
from rich.table import Table

from components.artifact import RECORD, Damaged, digest, fingerprint, read_record, sha256
from pipelines import dvc, ranks, snapshot
from pipelines.console import clock, console, key_metric, say
from pipelines.identity import STAGES, code_hashes
from pipelines.run import last_run
from pipelines.stages import read_run

STAGE = 13e6  # bytes of what a stage imports around its training: measured


def plan(root: Path, params: dict[str, Any]) -> list[dict[str, Any]]:
    """One entry a stage: what a run under `params` would do with it, why, and the seconds and memory it last took.

    `restore` means that this very result was made here before, so that DVC's run cache should hold it.
    """
    code = code_hashes(root)
    wanted = snapshot.need(root, params["ingest"])
    remade = [] if wanted.action == "keep" else [wanted.reason]
    entries = [{"stage": "ingest", "action": wanted.action, "reasons": remade, **_cost(root, "ingest")}]
    known = {"data": digest(root / "data")} if wanted.action == "keep" else {}
    for stage, reasons in dvc.stale(root, params, new_data=wanted.action == "ingest").items():
        inputs = {name: known.get(name) for name in dvc.inputs_of(root, stage)}
        action = "run" if reasons else "keep"
        if all(inputs.values()):
            inputs |= dvc.outside(root, stage, params[stage])
            mark = fingerprint(stage, params[stage], code[stage], {k: str(v) for k, v in inputs.items()})
            diary = root / ".forja" / "stages" / f"{stage}-{mark}"
            if action == "keep" and (root / "artifacts" / stage / RECORD).is_file():
                known[stage] = digest(root / "artifacts" / stage)
            elif read_run(diary).get("status") == "finished":
                action, known[stage] = "restore", sha256(diary / RECORD)
        entry = {"stage": stage, "action": action, "reasons": reasons, **_cost(root, stage)}
        if stage == "pretrain" and action == "run":
            entry["estimated_mb"] = estimated_mb(params[stage], params["tokenize"]["vocab_size"])
        entries.append(entry)
    return entries


def _cost(root: Path, stage: str) -> dict[str, Any]:
    """Seconds and peak megabytes of the last time this stage finished here; None where it never did."""
    runs = [read_run(p.parent) for p in (root / ".forja" / "stages").glob(f"{stage}-*/run.json")]
    done = [r for r in runs if r["status"] == "finished" and r["seconds"] is not None]
    last = max(done, key=lambda r: float(r["ended"]), default={})
    return {"seconds": last.get("seconds"), "peak_memory_mb": last.get("peak_memory_mb")}


def estimated_mb(recipe: dict[str, Any], vocab_size: int) -> float | None:
    """Peak megabytes of pretraining by shape and batch (memory.py), where it runs on the CPU, by one rank, undivided.

    None where it does not; where the recipe starts from a model whose shape it does not say; and for what was not held
    against measured peaks, the z-loss and packed documents.
    """
    from components.model.checkpoint import default_device

    divided = (os.environ.get(k, "") not in ("", off) for k, off in (("FORJA_ZERO", "0"), ("FORJA_PIPELINE", "1")))
    other = recipe["model"] is None or recipe["z_loss"] or recipe["packing"] != "stream"
    if other or ranks.wanted() > 1 or any(divided) or default_device().type != "cpu":
        return None
    from components.model.gpt import GPTConfig
    from components.model.memory import estimate
    from components.model.optim import Optim
    from components.model.ranks import micro_batch

    config = GPTConfig.model_validate({**recipe["model"], "vocab_size": vocab_size, "head": "lm"})
    optim = Optim.model_validate({k: v for k, v in recipe.items() if k in Optim.model_fields})
    micro = micro_batch(recipe["batch"])
    how = {
        "accumulation": recipe["batch"] // micro,
        "recompute": os.environ.get("FORJA_RECOMPUTE") == "1",
        "saves": recipe["save_every"] < recipe["steps"],
    }
    return (STAGE + estimate(config, optim, micro, recipe["context"] or config.context, **how)) / 2**20


def memory_mb() -> float:
    """What this process may hold: the machine's memory, or its control group's where that is less."""
    limits = [float(psutil.virtual_memory().total)]
    for path in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        if path.is_file() and (text := path.read_text().strip()).isdigit():
            limits.append(float(text))
    return min(limits) / 2**20


def show_plan(entries: list[dict[str, Any]]) -> None:
    table = Table("stage", "would", "why", "time", "peak memory", title="Plan")
    for e in entries:
        runs = e["action"] in ("run", "ingest")
        unknown = "unknown: never ran here" if runs and e["seconds"] is None else ""
        table.add_row(
            e["stage"],
            e["action"],
            "\n".join(e["reasons"]),
            unknown or (clock(e["seconds"]) if runs else ""),
            _memory(e) if runs else "",
        )
    console.print(table)
    for e in entries:
        if (said := e.get("estimated_mb")) and said > (room := memory_mb()):
            mend = "set a smaller FORJA_MICRO_BATCH, or FORJA_RECOMPUTE=1, or take a smaller model"
            say(f"{e['stage']} will need about {said:,.0f} MB, and there are {room:,.0f}: {mend}.")
    running = [e for e in entries if e["action"] in ("run", "ingest")]
    if not running:
        say("Nothing to compute.")
    elif all(e["seconds"] is not None for e in running):
        peak = max(e["peak_memory_mb"] or 0 for e in running)
        say(f"Expected: {clock(sum(e['seconds'] for e in running))}, at most {peak:,.0f} MB, as the last time.")


def _memory(entry: dict[str, Any]) -> str:
    last = f"{entry['peak_memory_mb']:,.0f} MB" if entry["peak_memory_mb"] else ""
    estimated = f"about {entry['estimated_mb']:,.0f} MB, estimated" if entry.get("estimated_mb") else ""
    return "\n".join(filter(None, (last, estimated)))


def status(root: Path) -> dict[str, Any]:
    """Stages (fresh, stale, missing or damaged, and why), the identity of the results, the last run's ids."""
    params = dvc.read_yaml(root / "params.yaml")
    reasons = dvc.stale(root, params) if params else {name: ["there is no params.yaml"] for name in STAGES}
    last = last_run(root)
    return {
        "recipe": params.get("recipe"),
        "data_version": dvc.data_version(root),
        "dvc_lock": dvc.lock_hash(root),
        "model": last.get("model"),
        "prefect_flow_run_id": last.get("prefect_flow_run_id"),
        "mlflow_run_id": last.get("mlflow_run_id"),
        "stages": [_standing(root, stage, reasons[stage]) for stage in STAGES],
    }


def _standing(root: Path, stage: str, reasons: list[str]) -> dict[str, Any]:
    entry: dict[str, Any] = {"stage": stage, "dvc_out": dvc.out_hash(root, stage), "fingerprint": None, "metrics": {}}
    try:
        record = read_record(root / "artifacts" / stage)
    except Damaged as e:
        return {**entry, "state": "stale", "reasons": reasons or [str(e)]}
    run = read_run(root / ".forja" / "stages" / f"{stage}-{record.fingerprint}")
    kept = ("seconds", "peak_memory_mb", "mlflow_run_id", "prefect_flow_run_id", "prefect_task_run_id", "reported")
    return {
        **entry,
        "state": "stale" if reasons else "fresh",
        "reasons": reasons,
        "fingerprint": record.fingerprint,
        "metrics": record.metrics,
        **{k: run.get(k) for k in kept},
    }


def show_status(found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(found, indent=2, sort_keys=True, ensure_ascii=False))
        return
    table = Table("stage", "state", "why", "key metric", "MLflow run", "Prefect task run", title="Stages")
    for s in found["stages"]:
        metric = key_metric(s["stage"], s["metrics"])
        ids = [(s.get(k) or "-")[-12:] for k in ("mlflow_run_id", "prefect_task_run_id")]
        table.add_row(s["stage"], s["state"], "\n".join(s["reasons"]), metric, *ids)
    console.print(table)
    for key in ("recipe", "data_version", "dvc_lock", "prefect_flow_run_id", "mlflow_run_id"):
        say(f"{key.replace('_', ' ')}: {found[key] or '-'}")
    model = found["model"]
    say(f"model: {model['name']} version {model['version']}, {model['alias']}" if model else "model: none promoted yet")
