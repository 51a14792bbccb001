"""Promotion: every gate holds and every artifact belongs to the chain, or the champion stays what it was.

Reads only sealed artifacts. Idempotent: the same bytes are registered once; the alias moves last, so a crash before it
leaves the old champion in place.
"""

import json
import math
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from components.artifact import Damaged, ForjaError, digest, read_record
from pipelines import dvc
from pipelines.identity import STAGES, code_hashes
from pipelines.track import EXPERIMENT, connect

SERVED = "int8"  # the folder of artifacts/quantize that is registered
SAMPLING = {"lang": "en", "max_new_tokens": 64, "temperature": 0.0, "seed": 0}  # what a caller of it may set
NEEDED_TO_SERVE = ("mlflow", "torch", "tokenizers", "safetensors", "pydantic", "numpy")


class Held(ForjaError):
    """A gate does not hold: nothing is promoted."""

    exit_code = 3


class Promoted(NamedTuple):
    name: str
    version: str
    alias: str
    new: bool


def read_gates(root: Path) -> tuple[bool, list[dict[str, Any]]]:
    """Whether all hold, and the gates as `evaluate` judged them, from its verified artifact.

    Fails closed: a gate without finite numbers does not pass, and no gates at all prove nothing.
    """
    folder = root / "artifacts" / "evaluate"
    read_record(folder)
    try:
        judged = json.loads((folder / "gates.json").read_bytes())
        gates: list[dict[str, Any]] = judged["gates"]
        for gate in gates:
            finite = all(isinstance(gate[k], int | float) and math.isfinite(gate[k]) for k in ("value", "limit"))
            gate["passed"] = gate["passed"] is True and finite
        holds = judged["verdict"] == "promote" and bool(gates) and all(gate["passed"] for gate in gates)
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise Damaged(f"{folder / 'gates.json'}: not the gates ({type(e).__name__}: {e}); run evaluate again") from None
    return holds, gates


def check_chain(root: Path, params: dict[str, Any]) -> None:
    """Every artifact is whole, of the recipe and code in force, and made from the others that lie here.

    Raises ForjaError naming the first that is not.
    """
    code = code_hashes(root)
    for stage in STAGES:
        folder = root / "artifacts" / stage
        record = read_record(folder)
        if record.config != params[stage]:
            raise ForjaError(f"{folder}: made by another recipe than params.yaml; run `forja run` or `dvc repro`")
        if record.code != code[stage]:
            raise ForjaError(f"{folder}: made by other code; run `forja run` or `dvc repro`")
        for name, path in dvc.inputs_of(root, stage).items():
            if record.inputs.get(name) != digest(path):
                raise ForjaError(f"{folder}: made from another {path}; run `forja run` or `dvc repro`")


def promote(root: Path, params: dict[str, Any], tags: dict[str, str], parent: str | None = None) -> Promoted:
    """Register artifacts/quantize/int8 and give it the alias. `tags` name the runs that led here.

    Raises Held with every failing gate's reason, ForjaError where the chain is broken, Unreachable without MLflow.
    """
    check_chain(root, params)
    holds, gates = read_gates(root)
    if not holds:
        reasons = [gate["reason"] for gate in gates if not gate["passed"]]
        raise Held("not promoted: " + ("; ".join(reasons) or "evaluate's verdict is to hold"))
    client = connect(root)
    name, alias = params["promote"]["name"], params["promote"]["alias"]
    mark = digest(root / "artifacts" / "quantize")
    found = _registered(client, name, mark)
    number = found or _register(root, client, name, parent, {**_identity(root, params), **tags, "forja.digest": mark})
    if _champion(client, name, alias) != number:
        client.set_registered_model_alias(name, alias, number)
    return Promoted(name, number, alias, new=found is None)


def champion_folder(root: Path, name: str, alias: str) -> Path:
    """The checkpoint folder of the registered champion. Raises ForjaError where there is none."""
    client = connect(root)
    number = _champion(client, name, alias)
    if number is None:
        raise ForjaError(f"model {name}: none is {alias} yet; run `forja run`, or name a folder with --model")
    import mlflow

    folder = Path(mlflow.artifacts.download_artifacts(f"models:/{name}/{number}"))
    found = sorted((folder / "artifacts").glob("*/model.json"))
    if not found:
        raise Damaged(f"model {name} version {number}: no checkpoint in {folder}; promote again with `forja promote`")
    return found[0].parent


def _identity(root: Path, params: dict[str, Any]) -> dict[str, str]:
    code = read_record(root / "artifacts" / "quantize", verify=False).code
    return {
        "forja.recipe": params["recipe"],
        "forja.data": dvc.data_version(root) or "",
        "forja.dvc_lock": dvc.lock_hash(root) or "",
        "forja.dvc_out": dvc.out_hash(root, "quantize") or "",
        "forja.code": code,
    }


def _registered(client: Any, name: str, mark: str) -> str | None:
    """The version that holds these bytes already."""
    versions = client.search_model_versions(f"name = '{name}' and tags.\"forja.digest\" = '{mark}'")
    numbers = sorted((int(v.version) for v in versions), reverse=True)
    return str(numbers[0]) if numbers else None


def _register(root: Path, client: Any, name: str, parent: str | None, tags: dict[str, str]) -> str:
    import mlflow
    from mlflow.exceptions import MlflowException

    mlflow.set_experiment(EXPERIMENT)
    served = root / "artifacts" / "quantize" / SERVED
    langs = json.loads((served / "prompts.json").read_bytes())
    sampling = SAMPLING if SAMPLING["lang"] in langs else {**SAMPLING, "lang": min(langs)}
    under = {"mlflow.parentRunId": parent} if parent else {}
    with mlflow.start_run(run_name="promote", tags={**under, **tags, "forja.stage": "promote"}) as run:
        logged = mlflow.pyfunc.log_model(
            name=name,
            python_model=str(Path(__file__).with_name("served_model.py")),
            artifacts={"model": str(served)},
            code_paths=[str(root / "components")],
            input_example=(["What does json.dumps do?"], sampling),
            pip_requirements=[f"{package}=={version(package).partition('+')[0]}" for package in NEEDED_TO_SERVE],
        )
    try:
        client.create_registered_model(name)
    except MlflowException as e:
        if e.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    made = client.create_model_version(
        name, f"models:/{logged.model_id}", run.info.run_id, tags=tags, model_id=logged.model_id
    )
    return str(made.version)


def _champion(client: Any, name: str, alias: str) -> str | None:
    from mlflow.exceptions import MlflowException

    try:
        return str(client.get_model_version_by_alias(name, alias).version)
    except MlflowException as e:
        if e.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise
