"""Great Expectations suites, as code: what each table must be as a whole, and what was found.

Great Expectations has no built-in for dialogues or damaged text, so such facts are columns computed beforehand. Its
context is ephemeral: nothing is written, and no analytics leave the machine.
"""

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from components.data.rules import CHOICES, KINDS, LANGS, SPLITS, Limits, Row, answers_of, said

if TYPE_CHECKING:
    import pandas

EXAMPLES = 3
FEW = 30  # rows of which nobody can tell whether their classes are even
DIALOGUES = ("instructions", "preferences", "prompts")
WORD = pa.dictionary(pa.int32(), pa.string())  # of which there are few
FACTS = pa.schema(
    {
        "broken": pa.string(),  # the rule that a line breaks: it has no other facts then
        "unwanted": pa.string(),  # why the recipe does not want the row
        "id": pa.string(),
        **dict.fromkeys(("source", "licence", "lang", "split", "roles", "kind", "label"), WORD),
        **dict.fromkeys(("provenance", "object", "damaged", "differs", "answer_beyond"), pa.bool_()),
        **dict.fromkeys(("n_chars", "n_choices", "same_choices"), pa.int64()),
    }
)


def facts(table: str, row: Row, text: str) -> dict[str, Any]:
    """What the suite looks at in one row. `text` is its content."""
    found: dict[str, Any] = {key: row[key] for key in ("id", "source", "licence", "lang", "split")}
    found |= {key: bool(row[key].strip()) or None for key in ("provenance", "object")}
    found |= {"n_chars": len(text), "damaged": "\0" in text or "\ufffd" in text}
    if table in DIALOGUES:
        found["roles"] = " ".join(m["role"] for m in row["messages"])
    if table == "preferences":
        found |= {
            "kind": row["kind"],
            "differs": len(answers_of(row)) == 1 or len(set(map(said, answers_of(row)))) == 2,
        }
        found["label"] = f"{'good' if 'chosen' in row else 'bad'} of judged" if row["kind"] == "judged" else None
    if table == "eval":
        many = len(row["choices"])
        found |= {"n_choices": many, "same_choices": many - len(set(row["choices"]))}
        found["answer_beyond"] = not 0 <= row["answer"] < many
        found["label"] = f"{row['answer'] + 1} of {many}"
    return found


def frame(table: str, kept: pa.Table, content: np.ndarray, splits_of_object: np.ndarray) -> "pandas.DataFrame":
    """The facts about the kept rows, one row each, with a number for what each says and the splits of its object."""
    names = ["id", "source", "licence", "provenance", "object", "lang", "split", "n_chars", "damaged"]
    names += ["roles"] if table in DIALOGUES else []
    names += ["kind", "differs", "label"] if table == "preferences" else []
    names += ["same_choices", "n_choices", "answer_beyond", "label"] if table == "eval" else []
    found = kept.select(names).to_pandas()
    if "label" in names:
        found["class_share"] = class_shares(found["label"])
    found["content"], found["splits_of_object"] = content, splits_of_object
    return found


def class_shares(labels: "pandas.Series[Any]") -> "pandas.Series[Any]":
    """For each row the share of its class among the classes of its kind ("1 of 4" among those "of 4"); none for rows
    without a class, and of kinds with too few rows to tell."""
    said = labels.astype(object)
    kinds = said.map(lambda label: label.partition(" of ")[2], na_action="ignore")
    times, many = said.map(said.value_counts()), kinds.map(kinds.value_counts())
    return (times / many).where(many >= FEW).astype(float)


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
    if table in ("preferences", "eval") and limits.max_class_share is not None:
        found.append(gxe.ExpectColumnValuesToBeBetween(column="class_share", max_value=limits.max_class_share))
    return found


def expectations(
    kept: Mapping[str, "pandas.DataFrame"], broken: Mapping[str, Sequence[str | None]],
    copies: Mapping[str, Sequence[str | None]], limits: Mapping[str, Limits],
) -> dict[str, list[dict[str, Any]]]:  # fmt: skip
    """The results of every suite by table: {expectation, column, kwargs, success, rows, unexpected, examples}.

    `kept` holds the facts about the kept rows; `broken` and `copies` one entry for each row read: the rule it broke, or
    what it is a copy of, with its place, or None.
    """
    os.environ["GX_ANALYTICS_ENABLED"] = "false"  # before the import, which reads it
    import great_expectations as gx
    import great_expectations.expectations as gxe
    import pandas
    from great_expectations.data_context.types.base import ProgressBarsConfig

    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = ProgressBarsConfig(globally=False)
    source = context.data_sources.add_pandas("forja")
    found: dict[str, list[dict[str, Any]]] = {}
    for table, facts_of in kept.items():
        columns = {"broken_rule": broken[table], "copy_of": copies[table]}
        read = pandas.DataFrame({name: pandas.Series(said, dtype=object) for name, said in columns.items()})
        shares = {"broken_rule": limits[table].max_rejected_share, "copy_of": limits[table].max_duplicate_share}
        allowed = [(column, 1 - share) for column, share in shares.items() if share is not None]
        whole = [gxe.ExpectColumnValuesToBeNull(column=column, mostly=mostly) for column, mostly in allowed]
        found[table] = []
        for name, data, wanted in (("read", read, whole), ("kept", facts_of, suite(table, limits[table]))):
            asset = source.add_dataframe_asset(f"{table} {name}")
            batch = asset.add_batch_definition_whole_dataframe("all").get_batch({"dataframe": data})
            result = batch.validate(gx.ExpectationSuite(name=f"{table} {name}", expectations=wanted))
            found[table] += [_result(r.to_json_dict(), data) for r in result.results]
    return found


def _result(found: dict[str, Any], data: "pandas.DataFrame") -> dict[str, Any]:
    """The lasting part of one result: no batch, id or time. Examples name their rows."""
    config, result = found["expectation_config"], found["result"]
    kwargs = {k: v for k, v in config["kwargs"].items() if k not in ("batch_id", "column")}
    values, column = result.get("partial_unexpected_list", []), config["kwargs"].get("column", "")
    examples = [str(x)[:200] for x in values[:EXAMPLES]]
    if values and "id" in data and column != "id":
        rows = data[data[column].isin(values)].head(EXAMPLES)
        examples = [f"{value} in {name}"[:200] for value, name in zip(rows[column], rows["id"], strict=True)]
    if found["exception_info"].get("raised_exception"):
        examples = [str(found["exception_info"]["exception_message"])[:200]]
    return {
        "expectation": config["type"],
        "column": column,
        "kwargs": kwargs,
        "success": bool(found["success"]),
        "rows": int(result.get("element_count", result.get("observed_value", 0))),
        "unexpected": int(result.get("unexpected_count", 0)),
        "examples": examples,
    }
