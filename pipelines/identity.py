"""The identity of code: for each stage, the modules its module reaches by imports, hashed without what a reader sees.

Comments, docstrings and formatting do not count; a helper's change counts for every stage that reaches it. Nothing is
imported: the modules are parsed. Imports inside functions count, as does `import_module("components...")` with its name
written out.
"""

import ast
import hashlib
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import yaml

from components.artifact import RECORD, ForjaError, digest, sha256, write_atomic

MODULES = {
    "ingest": "components.data.ingest",
    "validate": "components.data.validate",
    "tokenize": "components.data.tokenize",
    "pretrain": "components.train.pretrain",
    "sft": "components.train.sft",
    "reward": "components.train.reward",
    "referee": "components.train.referee",
    "ppo": "components.train.ppo",
    "quantize": "components.release.quantize",
    "evaluate": "components.release.evaluate",
}
STAGES = [name for name in MODULES if name != "ingest"]
# The key of a stage's section that may name files outside the chain: the bytes they hold are part of its identity.
SOURCES = {"validate": "decontaminate", "tokenize": "tokenizer", "pretrain": "init", "ppo": "judge"}


class Module(NamedTuple):
    digest: str
    imports: frozenset[str]


def code_hashes(root: Path, package: str = "components") -> dict[str, str]:
    """{stage: sha256 over its modules, in the order of their names}. Raises ForjaError where code does not parse."""
    modules = {_name(root, p): p for p in sorted((root / package).rglob("*.py"))}
    known = frozenset(modules)
    parsed = {name: _parse(path, path.read_bytes(), name, known) for name, path in modules.items()}
    return {stage: _hash(module, parsed) for stage, module in MODULES.items()}


def write_code_yaml(root: Path, sources: dict[str, str | None]) -> None:
    """code.yaml: every stage's hash and what the recipe's sources hold, read by DVC as parameters.

    Untouched where nothing changed.
    """
    hashes = {stage: h for stage, h in code_hashes(root).items() if stage in STAGES}
    text = yaml.safe_dump({**hashes, **sources}, sort_keys=True)
    path = root / "code.yaml"
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_atomic(path, text)


def bytes_of(source: Path) -> str:
    """The identity of what a source holds: sha256 of a file; of a sealed folder, its record's; of any other folder, one
    over its safetensors and JSON files."""
    if source.is_file():
        return sha256(source)
    if (source / RECORD).is_file():
        return digest(source)
    files = sorted(p for p in source.iterdir() if p.suffix in (".safetensors", ".json") and p.is_file())
    return hashlib.sha256("".join(f"{p.name} {sha256(p)}\n" for p in files).encode()).hexdigest()


def _name(root: Path, path: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@lru_cache(maxsize=1024)
def _parse(path: Path, text: bytes, name: str, known: frozenset[str]) -> Module:
    try:
        tree = ast.parse(text)
    except SyntaxError as e:
        raise ForjaError(f"{path}:{e.lineno}: {e.msg}; mend the file") from None
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    imports: set[str] = set()
    for node in ast.walk(tree):
        for target in _targets(node, package):
            parts = target.split(".")
            imports |= {p for i in range(len(parts)) if (p := ".".join(parts[: i + 1])) in known}
        _drop_strings(node)
    return Module(hashlib.sha256(ast.dump(tree).encode()).hexdigest(), frozenset(imports))


def _targets(node: ast.AST, package: str) -> list[str]:
    """The dotted names that one node imports; `from a import b` may mean the module a.b."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        up = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
        base = ".".join([*up, *([node.module] if node.module else [])])
        return [f"{base}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        return [str(node.args[0].value)] if called == "import_module" else []
    return []


def _drop_strings(node: ast.AST) -> None:
    """Take docstrings, and any other string that stands alone as a statement, out of a body."""
    body = getattr(node, "body", None)
    if isinstance(body, list):
        kept = [s for s in body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]
        node.body = kept or [ast.Pass()]  # type: ignore[attr-defined]


def _hash(module: str, parsed: dict[str, Module]) -> str:
    parts = module.split(".")
    reached: set[str] = set()
    new = {".".join(parts[: i + 1]) for i in range(len(parts))} & set(parsed)
    while new:
        reached |= new
        new = set().union(*(parsed[name].imports for name in new)) - reached
    return hashlib.sha256("".join(f"{name} {parsed[name].digest}\n" for name in sorted(reached)).encode()).hexdigest()
