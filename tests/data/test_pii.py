"""Personal data on labelled rows, Spanish and English, half of them hard negatives."""

import json
from collections import Counter
from pathlib import Path

from components.data.pii import find, iban_length, is_card, is_dni, redact, worth_a_look

ROWS = [json.loads(line) for line in (Path(__file__).parent / "pii_labelled.jsonl").open(encoding="utf-8")]


def test_precision_and_recall_on_the_labelled_rows() -> None:
    right: Counter[str] = Counter()
    wrong: Counter[str] = Counter()
    missed: Counter[str] = Counter()
    for row in ROWS:
        wanted = Counter((kind, value) for kind, value in row["pii"])
        got = Counter((f.kind, row["text"][f.start : f.end]) for f in find(row["text"]))
        right.update(kind for kind, _ in (wanted & got).elements())
        missed.update(kind for kind, _ in (wanted - got).elements())
        wrong.update(kind for kind, _ in (got - wanted).elements())
    for kind in sorted(right):
        precision, recall = right[kind] / (right[kind] + wrong[kind]), right[kind] / (right[kind] + missed[kind])
        print(f"{kind}: precision {precision:.3f}, recall {recall:.3f} of {right[kind] + missed[kind]}")
        assert precision >= 0.9 and recall >= 0.95, kind
    assert len(ROWS) >= 200 and set(right) == {"email", "phone", "ip", "iban", "card", "dni"}


def test_the_quick_look_loses_no_row() -> None:
    look = worth_a_look([row["text"] for row in ROWS])
    assert all(seen for row, seen in zip(ROWS, look, strict=True) if row["pii"])


def test_checksums_tell_one_changed_digit() -> None:
    assert is_card("4111111111111111") and not any(is_card(f"411111111111111{d}") for d in "023456789")
    assert is_dni("12345678Z") and sum(is_dni(f"12345678{c}") for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ") == 1
    assert iban_length("GB82 WEST 1234 5698 7654 32") == 27 and not iban_length("GB82 WEST 1234 5698 7654 33")


def test_what_is_redacted_leaves_the_rest() -> None:
    text = "Escribe a ana@correo.es o llama al +34 612 345 678."
    assert redact(text) == ("Escribe a [EMAIL] o llama al [PHONE].", ["email", "phone"])
