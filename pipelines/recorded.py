"""What MLflow and the registry hold of a pipeline run, found by any name that a person has for it.

A name is an alias or a version of the registered model, a recipe, a run's id or the beginning of one, or a git
revision, whose dvc.lock is that of a run. The rows and gates behind a run's numbers come from MLflow, or, where it has
none, from DVC's cache by the hash that MLflow noted.
"""

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from components.artifact import Damaged, ForjaError
from pipelines import dvc
from pipelines.data_diff import cache_of, git, listed
from pipelines.identity import MODULES
from pipelines.track import EVIDENCE, connect, experiment_id, flat

CURVES = ("val_reward", "reward", "kl")
ENDED = ("FINISHED", "FAILED")
Row = dict[str, Any]


class Stage(NamedTuple):
    """The run that made a stage's result; `cached` where an earlier one did."""

    run_id: str
    status: str
    cached: bool
    digest: str
    weights: str  # sha256 of the model that it made; "" where it made none, or none was noted
    code: str
    dvc_out: str
    metrics: dict[str, float]
    params: dict[str, str]


class Recorded(NamedTuple):
    """A pipeline run. `params` are leaves by dotted key; `whole` says that its whole recipe is among them, and not
    only the sections of the stages that it reached."""

    asked: str
    run_id: str
    recipe: str
    state: str  # promoted, held, failed, killed or running
    reason: str
    version: str  # "2 (champion)"; "" where nothing was registered
    data: str
    started: float
    where: str
    params: dict[str, Any]
    whole: bool
    stages: dict[str, Stage]
    curves: dict[str, list[tuple[float, float]]]
    gates: list[Row]
    rows: list[Row]
    gaps: list[str]

    @property
    def algorithm(self) -> str:
        """Of the stage `ppo`; runs from before there was a choice say none, and are PPO's."""
        known = any(key.startswith("ppo.") for key in self.params)
        return str(self.params.get("ppo.algorithm", "ppo")).upper() if known else "–"

    @property
    def metrics(self) -> dict[str, float]:
        """Evaluate's, and the sizes of quantize."""
        return self._of("quantize") | self._of("evaluate")

    def _of(self, stage: str) -> dict[str, float]:
        return self.stages[stage].metrics if stage in self.stages else {}


class Registry:
    """The tracking server, asked for runs by name."""

    def __init__(self, root: Path) -> None:
        self.root, self.client = root, connect(root)
        self.experiment = experiment_id(self.client)
        named = dvc.read_yaml(root / "params.yaml").get("promote") or {}
        self.models = [m for m in self.client.search_registered_models() if m.name == named.get("name", m.name)]

    def find(self, name: str) -> Any:
        """The MLflow run of the pipeline run that `name` means. Raises ForjaError where it means none, or several."""
        for look in (self._version, self._recipe, self._id, self._revision):
            if found := look(name):
                return found
        raise ForjaError(f"{name}: no alias, version, recipe, run id or git revision of a run; known: {self.known()}")

    def known(self) -> str:
        """What a person may name, in words."""
        runs = self._parents("tags.\"forja.recipe\" LIKE '%'")
        aliases = [alias for m in self.models for alias in m.aliases]
        versions = [v.version for m in self.models for v in self.client.search_model_versions(f"name = '{m.name}'")]
        recipes = dict.fromkeys(run.data.tags["forja.recipe"] for run in runs)
        newest = [run.info.run_id[:8] for run in runs[:5]]
        groups = {"aliases": aliases, "versions": versions, "recipes": recipes, "newest runs": newest}
        return "; ".join(f"{kind} {', '.join(map(str, names))}" for kind, names in groups.items() if names) or "nothing"

    def registered(self, version: str) -> str:
        """A version and its aliases, in words."""
        aliases = [alias for m in self.models for alias, number in m.aliases.items() if str(number) == version]
        return f"{version} ({', '.join(aliases)})" if aliases else version

    def _version(self, name: str) -> Any:
        for model in self.models:
            number = str(model.aliases[name]) if name in model.aliases else name
            asked = f"name = '{model.name}'"
            for version in self.client.search_model_versions(asked) if number.isdigit() else ():
                if str(version.version) == number:
                    return self._run_of(f"{model.name} version {number}", version.tags)
        return None

    def _run_of(self, what: str, tags: dict[str, str]) -> Any:
        """The run that registered a version, or, of one promoted by hand, a run with the same results."""
        if run_id := tags.get("forja.mlflow_run_id"):
            return self.client.get_run(run_id)
        lock = tags.get("forja.dvc_lock")
        if lock and (same := self._parents(f"tags.\"forja.dvc_lock\" = '{lock}'")):
            return same[0]
        raise ForjaError(f"{what}: promoted by hand, and no `forja run` recorded these results; run it, it links them")

    def _recipe(self, name: str) -> Any:
        """The newest run of a recipe that came to an end; only where there is none, one that did not."""
        stem = Path(name).stem
        if not re.fullmatch(r"[\w.-]+", stem):
            return None
        runs = self._parents(f"attributes.run_name = '{stem}' and tags.\"forja.recipe\" = '{stem}'")
        judged = [run for run in runs if run.info.status in ENDED and run.data.metrics]
        return next(iter([*judged, *runs]), None)

    def _id(self, name: str) -> Any:
        if not re.fullmatch(r"[0-9a-f]{4,32}", name):
            return None
        found = self.client.search_runs([self.experiment], f"attributes.run_id LIKE '{name}%'", max_results=20)
        above = {run.data.tags.get("mlflow.parentRunId", run.info.run_id) for run in found}
        if len(above) > 1:
            raise ForjaError(f"{name}: several runs begin so ({', '.join(r.info.run_id for r in found)}); say more")
        return self.client.get_run(above.pop()) if above else None

    def _revision(self, name: str) -> Any:
        if git(self.root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}") is None:
            return None
        lock = git(self.root, "show", f"{name}:./dvc.lock")
        if lock is None:
            raise ForjaError(f"{name}: this git revision holds no dvc.lock; known: {self.known()}")
        mark = hashlib.sha256(lock.encode()).hexdigest()
        runs = self._parents(f"tags.\"forja.dvc_lock\" = '{mark}'")
        if not runs:
            raise ForjaError(f"{name}: no run is recorded with the dvc.lock of this revision; known: {self.known()}")
        return runs[0]

    def _parents(self, wanted: str) -> list[Any]:
        """Pipeline runs, the newest first. A stage's run may have its parent's tags too, and a stage."""
        runs = self.client.search_runs([self.experiment], wanted, order_by=["attributes.start_time DESC"])
        return [run for run in runs if "forja.stage" not in run.data.tags]


def read(registry: Registry, asked: str) -> Recorded:
    """The run that `asked` means, with all that is recorded of it. What is missing is said in its gaps."""
    run = registry.find(asked)
    tags, gaps = run.data.tags, list[str]()
    stages = dict(_stages(registry, run))
    evaluate, ppo = stages.get("evaluate"), stages.get("ppo")
    evidence = _evidence(registry, "evaluate", evaluate, gaps) if evaluate else {}
    recipe = _recipe_of(registry, run)
    params = recipe or {f"{name}.{k}": v for name, stage in stages.items() for k, v in stage.params.items()}
    gates = json.loads(evidence["gates.json"])["gates"] if "gates.json" in evidence else []
    lines = evidence.get("rows.jsonl", b"").split(b"\n")
    version = tags.get("forja.model_version", "")
    return Recorded(
        asked=asked,
        run_id=run.info.run_id,
        recipe=tags["forja.recipe"],
        state=_state(run, gates),
        reason=tags.get("forja.reason", ""),
        version=registry.registered(version) if version else "",
        data=tags.get("forja.data", ""),
        started=run.info.start_time / 1000,
        where=tags.get("forja.checkout", ""),
        params=params,
        whole=bool(recipe),
        stages=stages,
        curves=_curves(registry, ppo) if ppo else {},
        gates=gates,
        rows=[json.loads(line) for line in lines if line],
        gaps=gaps,
    )


def _state(run: Any, gates: list[Row]) -> str:
    if run.info.status == "FAILED" and gates and not all(gate["passed"] for gate in gates):
        return "held"
    return {"FINISHED": "promoted", "FAILED": "failed", "KILLED": "killed"}.get(run.info.status, "running")


def _stages(registry: Registry, run: Any) -> Iterator[tuple[str, Stage]]:
    """The stages that the run reached, in the order of the chain.

    A result that was there before is linked by a tag. Runs replayed under this one may be of another recipe.
    """
    under = f"tags.\"mlflow.parentRunId\" = '{run.info.run_id}'"
    children = registry.client.search_runs([registry.experiment], under, order_by=["attributes.start_time DESC"])
    own = [c for c in children if "forja.replayed" not in c.data.tags]
    for name in MODULES:
        linked = run.data.tags.get(f"forja.cached.{name}")
        mine = [c for c in own if c.data.tags.get("forja.stage") == name]
        made = registry.client.get_run(linked) if linked else None
        made = made or next(iter([*(c for c in mine if c.info.status == "FINISHED"), *mine]), None)
        if made:
            final = {k.removeprefix("final."): v for k, v in made.data.metrics.items() if k.startswith("final.")}
            noted = {key: made.data.tags.get(f"forja.{key}", "") for key in ("digest", "weights", "code", "dvc_out")}
            metrics, status = {**made.data.metrics, **final}, made.info.status
            stage = Stage(made.info.run_id, status, bool(linked), **noted, metrics=metrics, params=made.data.params)
            yield name, stage


def _curves(registry: Registry, ppo: Stage) -> dict[str, list[tuple[float, float]]]:
    """What there is of the curves of reward and KL."""
    drawn = [key for key in CURVES if key in ppo.metrics]
    history = {key: registry.client.get_metric_history(ppo.run_id, key) for key in drawn}
    return {key: sorted((float(m.step), float(m.value)) for m in found) for key, found in history.items()}


def _recipe_of(registry: Registry, run: Any) -> dict[str, Any]:
    """The leaves of the params.yaml that the run kept; entries of a list go by their name, or their place."""
    found = _download(registry, run.info.run_id, ("params.yaml",))
    if "params.yaml" not in found:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "params.yaml"
        path.write_bytes(found["params.yaml"])
        return flat(_named(dvc.read_yaml(path)))


def _named(value: Any) -> Any:
    if isinstance(value, list) and value and all(isinstance(v, dict) for v in value):
        return {str(v.get("name", i)): _named(v) for i, v in enumerate(value)}
    return {k: _named(v) for k, v in value.items()} if isinstance(value, dict) else value


def _evidence(registry: Registry, name: str, stage: Stage, gaps: list[str]) -> dict[str, bytes]:
    """The files that the stage's run kept, from MLflow or from DVC's cache."""
    wanted = EVIDENCE[name]
    found = _download(registry, stage.run_id, wanted)
    if len(found) < len(wanted) and stage.dvc_out:
        files = listed(cache_of(registry.root), stage.dvc_out) or {}
        found |= {file: files[file][1].read_bytes() for file in wanted if file in files and file not in found}
    if stage.status == "FINISHED":
        gaps += [f"{name}: its {f} is neither in MLflow nor in DVC's cache" for f in wanted if f not in found]
    return found


def _download(registry: Registry, run_id: str, wanted: tuple[str, ...]) -> dict[str, bytes]:
    from mlflow.exceptions import MlflowException

    held = {file.path for file in registry.client.list_artifacts(run_id)} & set(wanted)
    found = {}
    folder = Path(tempfile.mkdtemp())
    try:
        for name in held:
            found[name] = Path(registry.client.download_artifacts(run_id, name, str(folder))).read_bytes()
    except (OSError, MlflowException) as e:
        raise Damaged(f"MLflow run {run_id}: {name} does not come ({e}); mend the artifact store") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return found
