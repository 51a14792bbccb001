"""Personal data on labelled rows, Spanish and English, half of them hard negatives."""

import json
from collections import Counter
from pathlib import Path

import pytest

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


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("mail ana.garcia+x@sub.example.co.uk now", ["email"]),
        ("escríbeme a josé@ejemplo.es", ["email"]),
        ("Llámame al +34 612 345 678", ["phone"]),
        ("Llámame al 612345678 por favor", ["phone"]),
        ("Tel. 91 123 45 67", ["phone"]),
        ("(212) 555-0187 is mine", ["phone"]),
        ("call 212-555-0187", ["phone"]),
        ("+1-212-555-0187", ["phone"]),
        ("ring +44 20 7946 0958", ["phone"]),
        ("020 7946 0958 is the office", ["phone"]),
        ("07700 900123 mobile", ["phone"]),
        ("+447700900123", ["phone"]),
        ("server 192.168.1.10 is up", ["ip"]),
        ("8.8.8.8", ["ip"]),
        ("version 1.2.3.4 of the lib", []),
        ("v10.0.19041.1 build", []),
        ("upgraded from 2.0.0.1 to 2.0.0.2", []),
        ("2001:0db8:85a3:0000:0000:8a2e:0370:7334", ["ip"]),
        ("fe80::1ff:fe23:4567:890a", ["ip"]),
        ("time 12:30:45", []),
        ("MAC 00:1A:2B:3C:4D:5E", []),
        ("ES91 2100 0418 4502 0005 1332", ["iban"]),
        ("ES9121000418450200051332", ["iban"]),
        ("ES92 2100 0418 4502 0005 1332", []),
        ("GB82 WEST 1234 5698 7654 32", ["iban"]),
        ("DE89370400440532013000", ["iban"]),
        ("4111 1111 1111 1111", ["card"]),
        ("4111 1111 1111 1112", []),
        ("5500-0000-0000-0004", ["card"]),
        ("378282246310005", ["card"]),
        ("DNI 12345678Z", ["dni"]),
        ("DNI 12345678A", []),
        ("NIE X1234567L", ["dni"]),
        ("NIE X1234567A", []),
        ("12.345.678-Z", ["dni"]),
        ("ISBN 978-3-16-148410-0", []),
        ("order 123456789", []),
        ("pi 3.14159265358979", []),
        ("year 2020-2021 and 1999", []),
        ("requests>=2.31.0.1", []),
        ("Chrome/119.0.6045.105 Safari", []),
        ("section 3.1.4.1 says", []),
        ("el puerto 10.0.0.1:8080", ["ip"]),
        ("http://10.1.2.3/admin", ["ip"]),
        ("user@localhost", []),
        ("file@2x.png", []),
        ("Teléfono: 34 93 123 45 67", ["phone"]),
        ("call me at 555-0187", ["phone"]),
        ("Mi DNI es 12345678-Z.", ["dni"]),
        ("Y1234567X", ["dni"]),
        ("IPv6 ::1 loopback", []),
        ("2001:db8::1", ["ip"]),
        ("TS 1700000000", []),
    ],
)
def test_forms_of_two_countries_and_what_only_looks_like_them(text: str, kinds: list[str]) -> None:
    assert [f.kind for f in find(text)] == kinds
    assert not kinds or worth_a_look([text])[0]
