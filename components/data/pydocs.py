"""The docstrings of the standard library or of an installed package, one JSON line an object.

This file is a script of its own: `python -s -P pydocs.py OUT [PACKAGE ...]`, started by sources.py in a child process,
because importing every module of a library has side effects that belong in no other process. It imports nothing of
forja. With no PACKAGE it reads the standard library. The lines are a function of the interpreter and the package alone:
names are sorted, and text with a memory address or a path of this machine is left out.
"""

import importlib
import inspect
import json
import pkgutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

# Importing these opens a browser, prints a poem, starts an editor or brings in tests; encodings is a hundred copies of
# one docstring. Tk and distutils are missing from some builds of one Python version, so that two would differ.
SKIPPED = {"antigravity", "this", "idlelib", "turtledemo", "test", "tests", "idle_test", "encodings", "lib2to3"}
SKIPPED |= {"tkinter", "turtle", "distutils"}
# Where an object says it lives, and where people find it.
KNOWN_AS = {"posix": "os", "posixpath": "os.path", "nt": "os"}


def module_names(packages: list[str]) -> Iterator[str]:
    """Public module names in sorted order: those of `packages`, or of the standard library when it is empty."""
    roots = packages or sorted(sys.stdlib_module_names - {"posix", "posixpath", "nt"})
    for root in roots:
        yield from _walk(root)
    if not packages:
        yield "os.path"


def _walk(name: str) -> Iterator[str]:
    last = name.rpartition(".")[2]
    if last in SKIPPED or last.startswith("_"):
        return
    yield name
    module = sys.modules.get(name)  # imported by the caller between two yields
    for found in sorted(pkgutil.iter_modules(getattr(module, "__path__", [])), key=lambda m: m.name):
        yield from _walk(f"{name}.{found.name}")


def import_all(names: Iterator[str]) -> tuple[dict[str, ModuleType], dict[str, str]]:
    """The modules that could be imported, and for the others the kind of error by name."""
    modules, failed = {}, {}
    for name in names:
        try:
            modules[name] = importlib.import_module(name)
        except KeyboardInterrupt:
            raise
        except BaseException as e:  # noqa: BLE001 - a module may raise anything, SystemExit too; it is recorded
            failed[name] = type(e).__name__
    return modules, failed


def _home(obj: Any) -> str:
    home = getattr(obj, "__module__", None)
    return KNOWN_AS.get(home, home) if isinstance(home, str) else ""


def canonical(modules: dict[str, ModuleType]) -> Iterator[tuple[str, str, Any]]:
    """(module, name, object) of each public function and class, once, under the name that people use.

    That is the shortest public path within the library where the object lives: asyncio.gather, not
    asyncio.tasks.gather; os.stat, not posix.stat.
    """
    best: dict[int, tuple[tuple[Any, ...], str, str, Any]] = {}
    tops = {name.partition(".")[0] for name in modules}
    for module_name, module in modules.items():
        listed = getattr(module, "__all__", ())
        for name, obj in vars(module).items():
            if name.startswith("_") or not (inspect.isclass(obj) or inspect.isroutine(obj)):
                continue
            home_top, top = _home(obj).partition(".")[0], module_name.partition(".")[0]
            if home_top in tops and home_top != top:
                continue  # imported from a neighbour, where it is found
            if home_top not in tops and home_top.lstrip("_") != top and not home_top.startswith("_"):
                continue  # a stranger's
            rank = (
                home_top.lstrip("_") != top,
                name not in listed,
                name != getattr(obj, "__name__", name),
                module_name.count("."),
                module_name != _home(obj),
                module_name,
                name,
            )
            if id(obj) not in best or rank < best[id(obj)][0]:
                best[id(obj)] = (rank, module_name, name, obj)
    for _, module_name, name, obj in sorted(best.values(), key=lambda found: found[1:3]):
        yield module_name, name, obj


def methods(cls: type) -> Iterator[tuple[str, Any]]:
    """The public methods that `cls` itself defines: what it inherits is the parent's."""
    for name, raw in sorted(vars(cls).items()):
        obj = raw.__func__ if isinstance(raw, staticmethod | classmethod) else raw
        if not name.startswith("_") and inspect.isroutine(obj):
            yield name, obj


def signature(obj: Any) -> str:
    """The call signature as text, or "" where there is none or it depends on this run or machine."""
    try:
        text = str(inspect.signature(obj))
    except KeyboardInterrupt:
        raise
    except Exception:  # noqa: BLE001 - foreign __signature__ and annotations may raise anything: then there is none
        return ""
    return "" if _local(text) else text


def docstring(obj: Any) -> str:
    """The object's own docstring, cleaned; "" where it has none or it names a path of this machine."""
    doc = vars(obj).get("__doc__") if inspect.isclass(obj) else getattr(obj, "__doc__", None)
    if not isinstance(doc, str) or _local(doc):
        return ""
    return inspect.cleandoc(doc).strip()


def _local(text: str) -> bool:
    places = (sys.prefix, sys.base_prefix, sys.executable, str(Path.home()), str(Path.cwd()))
    return " at 0x" in text or any(len(p) > 4 and p in text for p in places)


def collect(packages: list[str]) -> Iterator[dict[str, Any]]:
    """Rows {"name", "kind", "module", "signature", "doc"}, then one row {"modules": n, "failed": {name: error}}."""
    modules, failed = import_all(module_names(packages))
    for module_name, module in sorted(modules.items()):
        if doc := docstring(module):
            yield {"name": module_name, "kind": "module", "module": module_name, "signature": "", "doc": doc}
    seen: set[int] = set()
    names = set(modules)
    for module_name, name, obj in canonical(modules):
        full = name if module_name == "builtins" else f"{module_name}.{name}"
        members = [(full, "class" if inspect.isclass(obj) else "function", obj)]
        if inspect.isclass(obj):
            members += [(f"{full}.{m}", "method", method) for m, method in methods(obj)]
        for full_name, kind, member in members:
            if id(member) in seen or full_name in names or not (doc := docstring(member)):
                continue
            seen.add(id(member))
            names.add(full_name)
            row = {"name": full_name, "kind": kind, "module": module_name, "doc": doc}
            yield row | {"signature": signature(member)}
    yield {"modules": len(modules), "failed": failed}


def main(out: Path, packages: list[str]) -> None:
    warnings.simplefilter("ignore")
    with out.open("w", encoding="utf-8", newline="\n", errors="replace") as f:
        for row in collect(packages):
            f.write(json.dumps(row, sort_keys=True, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
