"""Recipes: conf/*.yaml composed into params.yaml, the whole and resolved recipe in force.

A recipe may begin with `base: other.yaml` and then says only what differs. `pretrain.model: NAME` stands for
conf/models/NAME.yaml and `prompts: [en, es]` for conf/prompts/*.yaml, by language. `--set section.key=value` comes
last. Every section is checked by the Config of its stage, so params.yaml holds nothing that a stage would refuse.
"""

import difflib
import importlib
from pathlib import Path
from typing import Any, Literal

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from components.artifact import ForjaError, write_atomic
from components.data.spread import Executor
from pipelines.identity import MODULES

Params = dict[str, Any]


class Promote(BaseModel, frozen=True, extra="forbid"):
    """The registered model's name, and the alias that the newest version that passed carries."""

    name: str
    alias: str


class Top(BaseModel, frozen=True, extra="forbid"):
    recipe: str
    seed: int


def use(root: Path, recipe: Path, sets: list[str]) -> Params:
    """Compose `recipe` and write params.yaml; the file is untouched when it says so already."""
    params = compose(root, recipe, sets)
    text = yaml.safe_dump(params, sort_keys=False, allow_unicode=True, width=120)
    path = root / "params.yaml"
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_atomic(path, text)
    return params


def compose(root: Path, recipe: Path, sets: list[str]) -> Params:
    """The complete recipe: {"recipe", "seed", one section a stage, "executor", "promote"}.

    Raises ForjaError with one line for each thing that is wrong: the key, the reason and the mend.
    """
    config = _load(root, recipe)
    early: list[str] = []
    late: list[str] = []
    for item in sets:
        if "=" not in item:
            raise ForjaError(f"--set {item}: no value; write --set section.key=value")
        (early if _has(config, item.partition("=")[0]) else late).append(item)
    _set(config, early)
    _expand(root, config)
    for item in late:
        key = item.partition("=")[0]
        if not _has(config, key):
            raise ForjaError(f"--set {key}: unknown key{_closest(key, _keys(config))}")
    _set(config, late)
    try:
        plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as e:
        raise ForjaError(f"{recipe}: {getattr(e, 'full_key', '') or ''}: {str(e).splitlines()[0]}; mend it") from None
    assert isinstance(plain, dict)  # noqa: S101
    return _checked(recipe, {str(k): v for k, v in plain.items()})


def _load(root: Path, recipe: Path) -> DictConfig:
    path = next((p for p in (root / recipe, recipe) if p.is_file()), None)
    if path is None:
        known = sorted(p.relative_to(root).as_posix() for p in (root / "conf").glob("*.yaml"))
        raise ForjaError(f"{recipe}: no such recipe{_closest(str(recipe), known) or '; see ' + ', '.join(known)}")
    config = _read(path, ())
    config.recipe = path.stem
    return config


def _read(path: Path, seen: tuple[Path, ...]) -> DictConfig:
    """A file of conf/, merged over the one that it names as its `base`."""
    if path.resolve() in seen:
        raise ForjaError(f"{path}: its chain of `base:` comes back to itself; take one away")
    try:
        config = OmegaConf.load(path)
    except FileNotFoundError:
        raise ForjaError(f"{seen[-1]}: its base {path.name} is no file beside it; mend the name") from None
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as e:
        raise ForjaError(f"{path}: not YAML ({' '.join(str(e).split())}); mend it") from None
    if not isinstance(config, DictConfig):
        raise ForjaError(f"{path}: a mapping of sections is wanted; mend it")
    base = config.pop("base", None)
    if base is not None:
        config = OmegaConf.merge(_read(path.parent / base, (*seen, path.resolve())), config)
        assert isinstance(config, DictConfig)  # noqa: S101
    return config


def _set(config: DictConfig, sets: list[str]) -> None:
    for item in sets:
        key, _, value = item.partition("=")
        try:
            OmegaConf.update(config, key, OmegaConf.from_dotlist([f"value={value}"])["value"])
        except (yaml.YAMLError, OmegaConfBaseException, IndexError, TypeError) as e:
            raise ForjaError(f"--set {item}: {' '.join(str(e).split())}; mend the value") from None


def _expand(root: Path, config: DictConfig) -> None:
    """Names of files become what the files hold."""
    model = OmegaConf.select(config, "pretrain.model")
    if isinstance(model, str):
        config.pretrain.model = named(root, "models", model, "pretrain.model")
    for name, section in config.items_ex(resolve=False):
        if isinstance(section, DictConfig) and OmegaConf.is_list(section.get("prompts")):
            files: dict[str, str] = {}
            for entry in section.prompts:  # a language, whose file has its name, or {language: file}
                files |= {entry: entry} if isinstance(entry, str) else {str(k): v for k, v in entry.items()}
            section.prompts = {lang: named(root, "prompts", x, f"{name!s}.prompts") for lang, x in files.items()}


def named(root: Path, kind: str, name: str, key: str) -> Any:
    """What conf/KIND/NAME.yaml holds. Raises ForjaError, naming `key`, where there is no such file."""
    path = root / "conf" / kind / f"{name}.yaml"
    if not path.is_file():
        known = sorted(p.stem for p in path.parent.glob("*.yaml"))
        raise ForjaError(f"{key}: no conf/{kind}/{name}.yaml; one of {', '.join(known) or 'none yet'}")
    config = _read(path, ())
    config.pop("published", None)  # what a model's makers say of its size, for readers and tests
    return config


def _checked(recipe: Path, plain: Params) -> Params:
    """Every section through the Config of its stage; all complaints at once."""
    sections = [*MODULES, "executor", "promote"]
    known = ["recipe", "seed", *sections]
    wrong = [f"{recipe}: {k}: unknown key{_closest(k, known)}" for k in plain if k not in known]
    params: Params = {}
    for name in ["", *sections]:
        schema = _schema(name)
        value = plain.get(name) if name else {k: plain[k] for k in ("recipe", "seed") if k in plain}
        try:
            checked = schema.model_validate(value).model_dump(mode="json")
            params |= {name: checked} if name else checked
        except ValidationError as e:
            wrong += [f"{recipe}: {line}" for line in complaints(e, name, schema)]
    if not wrong and _shared(params):
        wrong.append(
            f"{recipe}: referee.share: with reward.share over 1, so the referee would learn from rows of the reward "
            "model's; lower one of the two"
        )
    if wrong:
        raise ForjaError("\n".join(wrong))
    return params


def _shared(params: Params) -> bool:
    """Whether the two reward models would have rows in common: one takes its share from below, the other from above."""
    return sum(params[name].get("share", 0) for name in ("reward", "referee")) > 1 + 1e-9


def _schema(name: str) -> type[BaseModel]:
    if name in ("", "promote"):
        return Promote if name else Top
    if name == "executor":
        return Executor
    schema: type[BaseModel] = importlib.import_module(MODULES[name]).Config
    return schema


def complaints(error: ValidationError, section: str, schema: type[BaseModel]) -> list[str]:
    """One line for each error of pydantic's: the key, the reason and the mend."""
    lines = []
    for e in error.errors():
        path = [str(part) for part in ([section] if section else []) + list(e["loc"])]
        key = ".".join(path)
        if e["type"] == "extra_forbidden":
            known = [f"{section}.{field}" for field in schema.model_fields] if len(e["loc"]) == 1 else []
            lines.append(f"{key}: unknown key{_closest(key, known) or '; take it away'}")
        elif e["type"] == "missing" or (e["input"] is None and e["type"] != "value_error"):
            lines.append(f"{key}: missing; the recipe must name it, there are no hidden defaults")
        else:
            given = "" if e["input"] is None else f", not {e['input']!r}"
            lines.append(f"{key}: {_reason(e['msg'])}{given}; change it in the recipe or by --set")
    return lines


def _reason(message: str) -> str:
    return message.removeprefix("Value error, ")[:1].lower() + message.removeprefix("Value error, ")[1:]


def _has(config: DictConfig, key: str) -> bool:
    absent: Literal["<absent>"] = "<absent>"
    try:
        return OmegaConf.select(config, key, default=absent, throw_on_resolution_failure=False) != absent
    except OmegaConfBaseException:
        return False


def _keys(node: Any, prefix: str = "") -> list[str]:
    """All dotted keys of a configuration."""
    if not isinstance(node, DictConfig):
        return []
    keys = []
    for name, value in node.items_ex(resolve=False):
        keys += [f"{prefix}{name!s}", *_keys(value, f"{prefix}{name!s}.")]
    return keys


def _closest(key: str, known: list[str]) -> str:
    found = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"; did you mean {found[0]}?" if found else ""
