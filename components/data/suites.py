"""Great Expectations suites, as code: what each table must be as a whole, and what was found.

Great Expectations has no built-in for dialogues or damaged text, so such facts are columns computed beforehand. Its
context is ephemeral: nothing is written, and no analytics leave the machine.
"""

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from components.data.rules import CHOICES, KINDS, LANGS, SPLITS, Limits, Row, content, said

if TYPE_CHECKING:
    import pandas

EXAMPLES = 3


def frame(table: str, rows: Sequence[Row], splits_of: Mapping[str, set[str]]) -> "pandas.DataFrame":
    """The facts about `rows` that the suite looks at, one row each. `splits_of` maps an object to its splits."""
    import pandas

    facts: dict[str, list[Any]] = {
        key: [row[key] for row in rows] for key in ("id", "source", "licence", "provenance", "lang", "object", "split")
    }
    texts = [content(table, row) for row in rows]
    facts["n_chars"] = [len(text) for text in texts]
    facts["damaged"] = ["\0" in text or "\ufffd" in text for text in texts]
    facts["content"] = texts
    facts["splits_of_object"] = [len(splits_of[row["object"]]) for row in rows]
    if table in ("instructions", "preferences", "prompts"):
        facts["roles"] = [" ".join(m["role"] for m in row["messages"]) for row in rows]
    if table == "preferences":
        facts["kind"] = [row["kind"] for row in rows]
        facts["differs"] = [said(row["chosen"]) != said(row["rejected"]) for row in rows]
    if table == "eval":
        facts["same_choices"] = [len(row["choices"]) - len(set(row["choices"])) for row in rows]
        facts["n_choices"] = [len(row["choices"]) for row in rows]
        facts["answer_beyond"] = [not 0 <= row["answer"] < len(row["choices"]) for row in rows]
    return pandas.DataFrame(facts)


def suite(table: str, limits: Limits) -> list[Any]:
    """The expectations of `table` on its kept rows."""
    import great_expectations.expectations as gxe

    found: list[Any] = [
        gxe.ExpectColumnValuesToBeUnique(column="id"),
        *(gxe.ExpectColumnValuesToNotBeNull(column=c) for c in ("source", "licence", "provenance", "object")),
        gxe.ExpectColumnValuesToBeInSet(column="lang", value_set=list(LANGS)),
        gxe.ExpectColumnValuesToBeInSet(column="split", value_set=list(SPLITS)),
        gxe.ExpectColumnValuesToBeBetween(column="n_chars", min_value=limits.min_chars, max_value=limits.max_chars),
        gxe.ExpectColumnValuesToBeInSet(column="damaged", value_set=[False]),
        gxe.ExpectColumnValuesToBeUnique(column="content"),
        gxe.ExpectColumnValuesToBeInSet(column="splits_of_object", value_set=[1]),
    ]
    if table == "corpus":
        found.append(gxe.ExpectTableRowCountToBeBetween(min_value=1))
    if table == "instructions":
        found.append(
            gxe.ExpectColumnValuesToMatchRegex(column="roles", regex=r"^(?:user (?:assistant tool )*assistant ?)+$")
        )
    if table in ("preferences", "prompts"):
        found.append(gxe.ExpectColumnValuesToMatchRegex(column="roles", regex=r"^(?:.* )?(?:user|tool)$"))
    if table == "preferences":
        found.append(gxe.ExpectColumnValuesToBeInSet(column="kind", value_set=list(KINDS)))
        found.append(gxe.ExpectColumnValuesToBeInSet(column="differs", value_set=[True]))
    if table == "eval":
        few, many = CHOICES
        found.append(gxe.ExpectColumnValuesToBeBetween(column="n_choices", min_value=few, max_value=many))
        found.append(gxe.ExpectColumnValuesToBeInSet(column="same_choices", value_set=[0]))
        found.append(gxe.ExpectColumnValuesToBeInSet(column="answer_beyond", value_set=[False]))
    return found


def expectations(
    tables: Mapping[str, Sequence[Row]], broken: Mapping[str, Sequence[str | None]], limits: Mapping[str, Limits]
) -> dict[str, list[dict[str, Any]]]:
    """The results of every suite by table: {expectation, column, kwargs, success, rows, unexpected, examples}.

    `tables` holds the kept rows; `broken` one entry for each row read: the rule it broke, with its place, or None.
    """
    os.environ["GX_ANALYTICS_ENABLED"] = "false"  # before the import, which reads it
    import great_expectations as gx
    import great_expectations.expectations as gxe
    import pandas
    from great_expectations.data_context.types.base import ProgressBarsConfig

    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = ProgressBarsConfig(globally=False)
    source = context.data_sources.add_pandas("forja")
    splits_of: dict[str, set[str]] = {}
    for rows in tables.values():
        for row in rows:
            splits_of.setdefault(row["object"], set()).add(row["split"])
    found: dict[str, list[dict[str, Any]]] = {}
    for table, rows in tables.items():
        mostly = 1 - limits[table].max_rejected_share
        read = pandas.DataFrame({"broken_rule": pandas.Series(broken[table], dtype=object)})
        whole = [gxe.ExpectColumnValuesToBeNull(column="broken_rule", mostly=mostly)]
        kept = frame(table, rows, splits_of)
        found[table] = []
        for name, data, wanted in (("read", read, whole), ("kept", kept, suite(table, limits[table]))):
            asset = source.add_dataframe_asset(f"{table} {name}")
            batch = asset.add_batch_definition_whole_dataframe("all").get_batch({"dataframe": data})
            result = batch.validate(gx.ExpectationSuite(name=f"{table} {name}", expectations=wanted))
            found[table] += [_result(r.to_json_dict()) for r in result.results]
    return found


def _result(found: dict[str, Any]) -> dict[str, Any]:
    """The lasting part of one result: no batch, id or time."""
    config, result = found["expectation_config"], found["result"]
    kwargs = {k: v for k, v in config["kwargs"].items() if k not in ("batch_id", "column")}
    examples = [str(x)[:200] for x in result.get("partial_unexpected_list", [])[:EXAMPLES]]
    if found["exception_info"].get("raised_exception"):
        examples = [str(found["exception_info"]["exception_message"])[:200]]
    return {
        "expectation": config["type"],
        "column": config["kwargs"].get("column", ""),
        "kwargs": kwargs,
        "success": bool(found["success"]),
        "rows": int(result.get("element_count", result.get("observed_value", 0))),
        "unexpected": int(result.get("unexpected_count", 0)),
        "examples": examples,
    }
