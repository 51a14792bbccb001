"""Files as records: every form and compression gives the same rows, and what is broken costs only itself."""

import bz2
import csv
import gzip
import io
import json
import lzma
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from components.artifact import ForjaError
from components.data import archives, jsonfile, readers
from components.data.readers import files_of, kind_of, records

ROWS = [
    {"text": "Plain."},
    {"text": "Two\nlines, and a comma"},
    {"text": 'A "quoted" word; a\ttab'},
    {"text": "Ñandú, 日本, 😀, and a\u2028line separator"},
    {"text": " spaces around \r\n"},
]
UP = b"\xef\xbb\xbf"


def jsonl(rows: list[Any], end: str = "\n") -> bytes:
    return "".join(json.dumps(r, ensure_ascii=False) + end for r in rows).encode()


def table(rows: list[dict[str, Any]], delimiter: str = ",", end: str = "\n") -> bytes:
    f = io.StringIO(newline="")
    writer = csv.DictWriter(f, list(rows[0]), delimiter=delimiter, lineterminator=end)
    writer.writeheader()
    writer.writerows(rows)
    return f.getvalue().encode()


def parquet(rows: list[dict[str, Any]], **how: Any) -> bytes:
    f = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), f, **how)
    return f.getvalue()


def arrow(rows: list[dict[str, Any]], stream: bool) -> bytes:
    f, data = io.BytesIO(), pyarrow.Table.from_pylist(rows)
    with (pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file)(f, data.schema) as writer:
        writer.write_table(data)
    return f.getvalue()


FORMS = {
    "a.jsonl": jsonl(ROWS),
    "crlf.jsonl": jsonl(ROWS, "\r\n"),
    "bom.jsonl": UP + jsonl(ROWS),
    "no-last-end.jsonl": jsonl(ROWS)[:-1],
    "array.json": json.dumps(ROWS, indent=2).encode(),
    "one-line.json": json.dumps(ROWS).encode(),
    "bom.json": UP + json.dumps(ROWS, ensure_ascii=False).encode(),
    "lines.json": jsonl(ROWS),
    "concatenated.json": "".join(json.dumps(r, indent=1) for r in ROWS).encode(),
    "of-rows.json": json.dumps({"version": "1", "data": ROWS}).encode(),
    "two-lists.json": json.dumps({"train": ROWS[:2], "test": ROWS[2:]}).encode(),
    "columns.json": json.dumps({"text": [r["text"] for r in ROWS]}).encode(),
    "a.csv": table(ROWS),
    "crlf.csv": table(ROWS, end="\r\n"),
    "bom.csv": UP + table(ROWS),
    "a.tsv": table(ROWS, "\t"),
    "semicolon.csv": table([{"text": r["text"], "n": "1"} for r in ROWS], ";"),
    "names-with-commas.csv": table([{"text": r["text"], "one, two": "1", "n": "2,5"} for r in ROWS], ";"),
    "pipe.csv": table([{"text": r["text"], "n": "1"} for r in ROWS], "|"),
    "spreadsheet.csv": UP + b"sep=;\r\n" + table([{"text": r["text"], "n": "1"} for r in ROWS], ";", "\r\n"),
    "by-id.json": json.dumps({f"row {i}": r for i, r in enumerate(ROWS)}).encode(),
    "pandas.json": json.dumps({"text": {str(i): r["text"] for i, r in enumerate(ROWS)}}).encode(),
    "a.parquet": parquet(ROWS),
    "zstd.parquet": parquet(ROWS, compression="zstd", row_group_size=2),
    "stream.arrow": arrow(ROWS, stream=True),
    "file.arrow": arrow(ROWS, stream=False),
}


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def told(path: Path) -> list[tuple[int, str | None]]:
    return [(r.line, r.reason) for r in records(path)]


PACK = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard.compress}


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_rows(tmp_path: Path, name: str, packed: str) -> None:
    found = list(records(write(tmp_path / (name + packed), PACK[packed](FORMS[name]))))
    assert [r.value["text"] for r in found if r.reason is None] == [r["text"] for r in ROWS]
    assert len(found) == len(ROWS)
    if name.endswith(".jsonl"):
        assert [r.raw for r in found] == [json.dumps(r, ensure_ascii=False).encode() for r in ROWS]
    if name.endswith("a.csv"):
        assert [r.line for r in found] == [2, 3, 5, 6, 7]  # the second row takes two lines
    elif not name.endswith("csv") and not name.endswith("tsv"):
        assert [r.line for r in found] == [1, 2, 3, 4, 5]


def test_several_frames_of_zstandard_and_members_of_gzip(tmp_path: Path) -> None:
    for name, pack in (("a.jsonl.zst", zstandard.compress), ("a.jsonl.gz", gzip.compress)):
        path = write(tmp_path / name, pack(jsonl(ROWS[:2])) + pack(jsonl(ROWS[2:])))
        assert [r.value for r in records(path)] == ROWS


@pytest.mark.parametrize("packed", [".gz", ".bz2", ".xz", ".zst"])
def test_what_stands_before_a_truncation_counts(tmp_path: Path, packed: str) -> None:
    rows = [{"text": f"{i} " + "".join(chr(97 + (i * j) % 26) for j in range(1, 400))} for i in range(5_000)]
    data = PACK[packed](jsonl(rows))
    found = list(records(write(tmp_path / f"a.jsonl{packed}", data[: len(data) * 3 // 4])))
    good = [r for r in found if r.reason is None]
    assert [r.value for r in good] == rows[: len(good)]
    assert len(good) > 1000 and len(found) == len(good) + 1
    assert found[-1].reason is not None and found[-1].reason.startswith("broken file: ")
    assert found[-1].line == len(good) + 1


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("codec", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.csv", "a.json"])
def test_a_file_in_utf16_is_one_record_that_says_so(tmp_path: Path, name: str, codec: str, packed: str) -> None:
    data = f"\ufeff{FORMS['a.jsonl'].decode()}".encode(codec)
    why = "not UTF-8: the file is UTF-16; convert it by `iconv -f UTF-16 -t UTF-8`"
    assert told(write(tmp_path / (name + packed), PACK[packed](data))) == [(1, why)]


def test_parts_of_a_file_in_utf16_are_one_record_too(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ("\ufeff" + '{"text": "x"}\n' * 9).encode("utf-16-le"))
    parts = [readers.Part(0, 100, 1), readers.Part(100, 254, 5)]
    assert [len(list(records(path, None, part))) for part in parts] == [1, 0]


def test_broken_containers_say_so(tmp_path: Path) -> None:
    for name, data in (
        ("a.parquet", FORMS["a.parquet"][:-20]),
        ("b.parquet", b"PAR1 no parquet"),
        ("empty.parquet", b""),
        ("a.arrow", FORMS["stream.arrow"][:40]),
        ("a.jsonl.gz", b"no gzip"),
        ("a.jsonl.bz2", b"no bzip"),
        ("a.jsonl.xz", b"no xz"),
        ("a.jsonl.zst", b"no zstandard at all"),
        ("a.zip", b"PK no zip"),
        ("a.tar", b"no tar" * 200),
    ):
        [(_, reason)] = told(write(tmp_path / name, data))
        assert reason is not None and reason.startswith("broken file: "), name


HOSTILE = [
    (b'{"text": "\xff"}', "not UTF-8: byte 11 is 0xff"),
    (b'{"text": "\\ud800"}', "damaged text: half of a surrogate pair"),
    (b'{"text": "\xed\xa0\x80"}', "not UTF-8: byte 11 is 0xed"),
    (b'{"text": "a\\u0000"}', "damaged text: NUL"),
    (b'{"text": "a\x00"}', "not JSON: Invalid control character at at character 12"),
    (b'{"text": NaN}', "not JSON: NaN is no JSON number"),
    (b'{"text": "a", "n": -Infinity}', "not JSON: -Infinity is no JSON number"),
    (b'{"text": "a", "n": 1e999}', "not JSON: 1e999 is beyond a number's range"),
    (b'{"text": "a", "b": {"c": 1, "c": 2}}', "duplicate key: 'c'"),
    (b'{"text" : "a", "text":"b"}', "duplicate key: 'text'"),
    (b'{"a" :"\\":", "a":"b"}', "duplicate key: 'a'"),  # what stands in a string makes up for the space
    (b"[" * 100_000, "not JSON: nested too deeply, or a number too long"),
    (b'{"a":' * 300 + b"1" + b"}" * 300, "not JSON: nested too deeply, beyond 200 levels"),
    (b"", "empty line"),
    (b'{"text": "cut', "not JSON: Unterminated string starting at at character 10"),
]
SOUND = [
    (b'{"text": "a\\u2028b"}', {"text": "a\u2028b"}),
    ('{"text": "a\u2028b\u2029c\x85d"}'.encode(), {"text": "a\u2028b\u2029c\x85d"}),
    (b'{"a": "\\\\", "b": "\\":", "c" : 1}', {"a": "\\", "b": '":', "c": 1}),
    (b'{"n": 123456789012345678901234567890}', {"n": 123456789012345678901234567890}),
    (b'{"n": 18446744073709551616, "m": -9223372036854775809}', {"n": 2**64, "m": -(2**63) - 1}),
    (b'{"a": {"k": 1}, "b": {"k": 1}}', {"a": {"k": 1}, "b": {"k": 1}}),
    (b'"text"', "text"),
]


def test_hostile_lines_cost_only_themselves(tmp_path: Path) -> None:
    lines = [line for pair in zip(HOSTILE, SOUND * 3, strict=False) for line, _ in pair]
    found = list(records(write(tmp_path / "a.jsonl", b"\n".join(lines) + b"\n")))
    assert [r.reason for r in found[0::2]] == [reason for _, reason in HOSTILE]
    assert [r.value for r in found[1::2]] == [value for _, value in (SOUND * 3)[: len(HOSTILE)]]
    assert [r.raw for r in found] == lines
    assert [r.line for r in found] == list(range(1, len(lines) + 1))


def test_hostile_values_in_a_json_file_cost_only_themselves(tmp_path: Path) -> None:
    hostile = [
        (raw, why) for raw, why in HOSTILE if raw and "cut" not in why and b"[[" not in raw and b"cut" not in raw
    ]
    parts = [part for (raw, _), (sound, _) in zip(hostile, SOUND * 3, strict=False) for part in (raw, sound)]
    found = list(records(write(tmp_path / "a.json", b"[\n" + b",\n".join(parts) + b"\n]")))
    assert [r.reason for r in found[0::2]] == [f"{why} (line {2 * i + 2})" for i, (_, why) in enumerate(hostile)]
    assert [r.value for r in found[1::2]] == [value for _, value in (SOUND * 3)[: len(hostile)]]
    [(_, reason)] = told(write(tmp_path / "bomb.json", b"[" * 100_000))
    assert reason == "not JSON: a bracket or string is never closed (line 1)"
    assert told(write(tmp_path / "bomb2.json", b"[" * 100_000 + b"]" * 100_000))[0][1].startswith(
        "not JSON: nested too"
    )


@pytest.mark.parametrize(
    ("text", "reasons"),
    [
        (b"", []),
        (b"[]", []),
        (b" [ ] \n[] ", []),
        (b"[1,]", [None, "not JSON: nothing stands beside a comma (line 1)"]),
        (b"[,1]", ["not JSON: nothing stands beside a comma (line 1)", None]),
        (b"[1", ["not JSON: a bracket or string is never closed (line 1)"]),
        (b"[1}", ["not JSON: a bracket or string is never closed (line 1)"]),
        (b"]", ["not JSON: ']' stands where a value should (line 1)"]),
        (b'1 2 "a" {} [3]', [None] * 5),
        (b"[1 2]", ["not JSON: Extra data at character 3 (line 1)"]),
        (b'["a', ["not JSON: a bracket or string is never closed (line 1)"]),
        (b'{"a": "}"} {"b": "\\"]"}', [None, None]),
    ],
)
def test_cuts_of_json_files(tmp_path: Path, text: bytes, reasons: list[str | None]) -> None:
    assert [reason for _, reason in told(write(tmp_path / "a.json", text))] == reasons


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64])
def test_cuts_do_not_depend_on_where_a_read_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    values = [1, 'a\\"]', {"k": ["[", {"x": "}"}]}, [[]], None, "\u2028é"]
    text = json.dumps(values, indent=1, ensure_ascii=False) + " ".join(json.dumps(v) for v in values)
    monkeypatch.setattr(jsonfile, "CHUNK", chunk)
    found = [r.value for r in records(write(tmp_path / "a.json", text.encode()))]
    assert found == [*values, 1, 'a\\"]', {"k": ["[", {"x": "}"}]}, [], None, "\u2028é"]  # of an array, its elements


def test_a_line_over_the_limit_is_turned_away_and_the_next_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "LINE", 10_000)
    long, fits = b'{"text": "%s"}' % (b"x" * 20_000), b'{"text": "%s"}' % (b"x" * 9_980)
    found = list(records(write(tmp_path / "a.jsonl", b"\n".join([fits, long, b'{"text": "after"}', long]))))
    too_long = "line too long: over 10,000 bytes"
    assert [r.reason for r in found] == [None, too_long, None, too_long]
    assert found[1].raw == long[: readers.RAW] and found[2].value == {"text": "after"}
    [(_, reason)] = told(write(tmp_path / "a.json", b"[" + long + b"]"))
    assert reason == "value too long: over 10,000 bytes (line 1)"


def test_fifty_megabytes_in_one_line(tmp_path: Path) -> None:
    text = "é" * 25_000_000
    path = write(tmp_path / "a.jsonl", b'{"text": "' + text.encode() + b'"}\n{"text": "after"}\n')
    assert [len(r.value["text"]) for r in records(path)] == [25_000_000, 5]


def test_csv_rows_that_do_not_fit(tmp_path: Path) -> None:
    data = b'a,b\n1,2\n1\n1,2,3\n"x\ny",\xff\n\n"nul\x00",2\n"never closed,2\n3,4\n"x"y,5\n6,7\n'
    found = list(records(write(tmp_path / "a.csv", data)))
    assert [(r.line, r.reason) for r in found] == [
        (2, None),
        (3, "not a row: 1 fields, the header has 2"),
        (4, "not a row: 3 fields, the header has 2"),
        (5, "not UTF-8: byte 7 is 0xff"),
        (7, "empty line"),
        (8, "damaged text: NUL"),
        (9, "not CSV: ',' expected after '\"'"),  # the next quote closes it, two lines below
        (10, None),
        (11, "not CSV: ',' expected after '\"'"),
        (12, None),
    ]
    assert b"\n".join(r.raw for r in found) + b"\n" == data[4:]
    assert found[3].raw == b'"x\ny",\xff'


def test_a_header_that_cannot_be_read_and_commas_of_mmlu(tmp_path: Path) -> None:
    [(line, reason)] = told(write(tmp_path / "cr.csv", b"a,b\r1,2\r3,4\r"))
    assert line == 1 and reason is not None and reason.startswith("not CSV: its header cannot be read (")
    found = list(records(write(tmp_path / "mmlu.csv", b"Of 1;2;3;4;5;6;7;8,x,y,z,w,C\n")))
    assert [r.value["answer"] for r in found] == ["C"]


def test_squads_articles_give_their_questions(tmp_path: Path) -> None:
    asked = [
        {"id": "1", "question": "Who?", "answers": [{"text": "Ann"}]},
        {"id": "2", "question": "Why?", "answers": []},
    ]
    article = {"title": "T", "paragraphs": [{"context": "Ann won.", "qas": asked}]}
    found = list(records(write(tmp_path / "a.json", json.dumps({"version": "2", "data": [article]}).encode())))
    assert [r.value for r in found] == [{**q, "context": "Ann won.", "object": "T"} for q in asked]
    bare = {"title": "T", "paragraphs": [{"qas": asked}]}
    assert [r.value for r in records(write(tmp_path / "b.json", json.dumps({"data": [bare]}).encode()))] == [bare]


def test_names_given_twice_in_a_header_and_lines_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [r.value for r in records(write(tmp_path / "a.csv", b"a,a,b\n1,2,3\n"))] == [
        {"a": "1", "a.2": "2", "b": "3"}
    ]
    monkeypatch.setattr(readers, "LINE", 100)
    found = told(write(tmp_path / "b.csv", b"a,b\n" + b"x" * 200 + b",1\n2,3\n"))
    assert found == [(2, "line too long: only its beginning was read"), (3, None)]


def test_tables_with_nothing_and_one_row_and_nested_columns(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.json", "a.csv", "a.txt", "a.tsv", "a.md"):
        assert told(write(tmp_path / name, b"")) == []
    assert told(write(tmp_path / "header.csv", b"a,b\n")) == []
    assert told(write(tmp_path / "none.parquet", parquet([{"a": 1}])[:0] or b"x"))[0][1].startswith("broken file")
    empty = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), empty)
    assert told(write(tmp_path / "empty.parquet", empty.getvalue())) == []
    rows = [{"messages": [{"role": "user", "content": f"hi {i}"}], "n": {"deep": [i, None]}} for i in range(1300)]
    found = list(records(write(tmp_path / "nested.parquet", parquet(rows, row_group_size=500))))
    assert [r.value for r in found] == rows and [r.line for r in found] == list(range(1, 1301))


def test_a_parquet_row_that_is_no_utf8_costs_only_itself(tmp_path: Path) -> None:
    texts = [b"good", b"bad \xff", b"good too", b"nul \x00"]
    column = pyarrow.Array.from_buffers(pyarrow.string(), 4, pyarrow.array(texts, pyarrow.binary()).buffers())
    f = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), f)
    found = list(records(write(tmp_path / "a.parquet", f.getvalue())))
    assert [(r.line, r.value and r.value["text"]) for r in found] == [
        (1, "good"),
        (2, None),
        (3, "good too"),
        (4, None),
    ]
    assert found[1].reason == "not UTF-8: byte 5 of a text is 0xff" and found[3].reason == "damaged text: NUL"


def test_text_in_pieces_is_the_text(tmp_path: Path) -> None:
    paragraphs = ["word " * (50 + 37 * i % 900) + "\n" * (1 + i % 4) for i in range(200)]
    text = "\n\n" + "".join(paragraphs)
    found = list(records(write(tmp_path / "a.txt", UP + text.replace("\n", "\r\n").encode())))
    assert "".join(r.value for r in found) == text
    assert len(found) > 50 and max(len(r.value) for r in found) < readers.WHOLE
    for r in found:  # each says the line where it begins
        before = "".join(x.value for x in found[: found.index(r)])
        assert r.line == before.count("\n") + 1
    short = "A.\n\nB.\n\n\n"
    [one] = records(write(tmp_path / "b.md", short.encode()))
    assert (one.value, one.line) == (short, 1)


def test_a_piece_of_text_that_is_damaged_costs_only_itself(tmp_path: Path) -> None:
    good = "word " * 590 + "\n\n"
    data = (good * 4).encode() + b"two\nlines \xff\n\n" + (good * 4).encode() + b"a NUL \x00\n\n" + good.encode() * 3
    found = list(records(write(tmp_path / "a.txt", data)))
    reasons = [r.reason for r in found if r.reason]
    assert reasons == ["not UTF-8: byte 7 of line 10 is 0xff", "damaged text: NUL"]
    assert b"".join(r.raw for r in found) == data
    assert sum(r.reason is None for r in found) >= 8


def test_members_of_archives_and_those_that_climb_out(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as z:
        z.writestr("in/a.jsonl", FORMS["a.jsonl"])
        z.writestr("../evil.jsonl", b"{}")
        z.writestr("/abs.jsonl", b"{}")
        link = zipfile.ZipInfo("link.jsonl")
        link.external_attr = 0o120777 << 16
        z.writestr(link, "/etc/passwd")
        z.writestr("b.csv.gz", gzip.compress(FORMS["a.csv"]))
        z.writestr("c.parquet", FORMS["a.parquet"])
        z.writestr("inner.zip", b"PK")
        z.writestr("picture.png", b"png")
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as t:
        for name, kind, body in (
            ("in/a.jsonl", tarfile.REGTYPE, FORMS["a.jsonl"]),
            ("../evil.jsonl", tarfile.REGTYPE, b"{}"),
            ("/abs.jsonl", tarfile.REGTYPE, b"{}"),
            ("link.jsonl", tarfile.SYMTYPE, b""),
            ("hard.jsonl", tarfile.LNKTYPE, b""),
            ("fifo.jsonl", tarfile.FIFOTYPE, b""),
            ("b.parquet", tarfile.REGTYPE, FORMS["a.parquet"]),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.size, member.linkname = kind, len(body), "/etc/passwd"
            t.addfile(member, io.BytesIO(body))
    packers = {"a.tar": bytes, "a.tar.gz": gzip.compress, "a.tgz": gzip.compress, "a.tar.zst": zstandard.compress}
    for name, packed in packers.items():
        write(tmp_path / name, packed(data.getvalue()))
    before = sorted(p.name for p in tmp_path.iterdir())
    climbs, link = "archive: the member's name climbs out of its folder", "archive: the member is a link or a device"
    found = list(records(tmp_path / "a.zip", "a.zip"))
    assert [r.value for r in found if r.reason is None] == ROWS * 3
    assert {r.file: r.reason for r in found if r.reason} == {
        "a.zip!../evil.jsonl": climbs,
        "a.zip!/abs.jsonl": climbs,
        "a.zip!link.jsonl": link,
        "a.zip!inner.zip": "archive: an archive within an archive is not read",
    }
    for name in packers:
        found = list(records(tmp_path / name, "t"))
        assert [r.value for r in found if r.reason is None] == ROWS * 2
        assert [r.reason for r in found if r.reason] == [climbs, climbs, link, link, link]
    assert sorted(p.name for p in tmp_path.iterdir()) == before and not (tmp_path.parent / "evil.jsonl").exists()


def test_which_files_are_a_sources(tmp_path: Path) -> None:
    names = ["a.jsonl", "sub/b.csv.gz", "c.txt.dev", "README.md", "LICENSE.txt", ".git/x.txt", "p.png", "sub/d.parquet"]
    for name in names:
        write(tmp_path / name, b"x")
    found = [p.relative_to(tmp_path).as_posix() for p in files_of(tmp_path)]
    assert found == ["a.jsonl", "c.txt.dev", "sub/b.csv.gz", "sub/d.parquet"]
    assert [p.name for p in files_of(str(tmp_path / "**/*.gz"))] == ["b.csv.gz"]
    assert [p.name for p in files_of(tmp_path / "README.md")] == ["README.md"]  # asked for by name
    with pytest.raises(ForjaError, match="its ending is none of"):
        files_of(tmp_path / "p.png")
    assert (
        kind_of("x.TXT.GZ") == ("text", "gz") and kind_of("x.tar.gz") == ("tar", "gz") and kind_of("x") == (None, None)
    )


def test_files_of_other_kinds_are_named_by_their_endings(tmp_path: Path) -> None:
    for name in ("a.txt", "b.docx", "sub/c.DOCX", "d.7z", "Makefile", ".hidden.pdf", ".git/x.pdf", "README.rst"):
        write(tmp_path / name, b"x")
    assert readers.passed_over(tmp_path) == {".docx": 2, ".7z": 1, "Makefile": 1}
    assert not readers.passed_over(tmp_path / "b.docx") and not readers.passed_over("hf:org/name")


def test_a_folder_that_datasets_saved(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    saved = datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:2])}
    )
    saved.save_to_disk(tmp_path / "saved")
    write(tmp_path / "saved" / "train" / "cache-123.arrow", FORMS["stream.arrow"])
    found = files_of(tmp_path / "saved")
    assert [p.relative_to(tmp_path / "saved").parts[0] for p in found] == ["test", "train"]
    assert [[r.value for r in records(p)] for p in found] == [ROWS[:2], ROWS]


def test_mmlu_as_first_published_has_no_header(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", b"What?,one,two,three,four,B\nWhy?,a,b,c,d,D\n")
    assert [r.value for r in records(path)] == [
        {"question": "What?", "A": "one", "B": "two", "C": "three", "D": "four", "answer": "B"},
        {"question": "Why?", "A": "a", "B": "b", "C": "c", "D": "d", "answer": "D"},
    ]


def test_zstandard_is_read_as_a_stream(tmp_path: Path) -> None:
    data = bytes(range(256)) * 40_000
    with archives.unpacked(io.BytesIO(zstandard.compress(data)), "zst") as f:
        assert f.read(1000) == data[:1000] and f.read() == data[1000:]
