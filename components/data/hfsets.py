"""Sets of the Hugging Face hub, streamed: hf:org/name, with a configuration hf:org/name:config, and of a certain
revision hf:org/name@revision. Without one it is the newest, and each row's provenance says which that was."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from components.artifact import ForjaError
from components.data.readers import Record
from components.data.strict import Unfit, check
from components.data.tables import as_text


class Set(NamedTuple):
    """One split of a set: its name as a file, its records, its licence, and the revision that is read."""

    name: str
    records: Iterator[Record]
    licence: str | None
    revision: str | None


def parse(source: str) -> tuple[str, str | None, str | None]:
    """(org/name, configuration, revision)."""
    rest, _, revision = source.removeprefix("hf:").partition("@")
    name, _, config = rest.partition(":")
    if not name:
        raise ForjaError(f"{source}: names no set; write hf:org/name")
    return name, config or None, revision or None


def splits(source: str, label: str) -> list[Set]:
    """The splits of a set. Raises ForjaError where the hub does not give it."""
    import datasets

    name, config, revision = parse(source)
    licence, newest = _about(name, revision)
    revision = revision or newest
    try:
        found: Any = datasets.load_dataset(name, config, revision=revision, streaming=True)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as e:
        why = " ".join(str(e).split())[:300]
        raise ForjaError(
            f"{source}: the hub does not give it ({why}); check the name, or save it and give its folder"
        ) from None
    sets = found.items() if hasattr(found, "items") else [(str(found.split or "train"), found)]
    return [Set(f"{label}/{split}", _records(f"{label}/{split}", rows), licence, revision) for split, rows in sets]


def _about(name: str, revision: str | None) -> tuple[str | None, str | None]:
    """The licence that the set's card names, and the commit; None where the hub does not say."""
    import huggingface_hub

    try:
        info = huggingface_hub.dataset_info(name, revision=revision)
    except Exception:  # noqa: BLE001  # its HTTP library's own, too; whoever loads the set says what is the matter
        return None, None
    said = getattr(info.card_data, "license", None)
    return said if isinstance(said, str) and said.strip() else None, info.sha


def _records(name: str, rows: Any) -> Iterator[Record]:
    number = 0
    try:
        for number, row in enumerate(rows, start=1):
            value = dict(row)
            try:
                check(value)
            except Unfit as e:
                yield Record(name, number, None, as_text(value), str(e))
                continue
            yield Record(name, number, value, b"", None)
    except (OSError, ValueError, RuntimeError) as e:
        why = " ".join(str(e).split())[:200]
        raise ForjaError(f"{name}: the hub broke off after row {number} ({why}); give the command again") from None
