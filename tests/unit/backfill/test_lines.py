"""Lists of one entry a line: what each line becomes, and that each cursor goes on after its entry."""

from __future__ import annotations

import gzip
import io
from pathlib import Path

import pytest

from shiwu.backfill.entries import Entry
from shiwu.backfill.sources.lines import MAX_LINE_BYTES, StandardInput
from shiwu.backfill.sources.opening import open_source
from shiwu.parts import Objects, SourceError

JSONL = (
    b"\xef\xbb\xbf"
    b'{"image": "s3://b/a.jpg"}\n'
    b"\n"
    b'{"source-ref": "s3://b/c d+%20.jpg", "team": "x", "n": 3}\r\n'
    b'{"image": "s3://b/\\u732b.jpg", "metadata": [1, 2]}\n'
    b'{"image": "https://h/x.jpg?a=1"}'
)
CSV_HEADER = 'id,image,note\n1,s3://b/a.jpg,"two\nlines"\n2,"s3://b/c,d.jpg",x\n'
CSV_S3 = "photos,a+b/%E7%8C%AB%2B.jpg\nphotos,c.jpg,v1\n"


def entries(path: Path, cursor: str = "") -> list[Entry]:
    """All entries of a file after the cursor."""
    source = open_source(str(path), objects=Objects({}))
    try:
        return list(source.entries(cursor))
    finally:
        source.close()


def write(folder: Path, name: str, data: bytes) -> Path:
    """A file, compressed if its name says so."""
    path = folder / name
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path


@pytest.mark.parametrize("name", ["list.jsonl", "list.jsonl.gz", "LIST.NDJSON"])
def test_json_lines_become_references_and_metadata(tmp_path: Path, name: str) -> None:
    found = entries(write(tmp_path, name, JSONL))
    assert [(entry.reference, entry.metadata) for entry in found] == [
        ("s3://b/a.jpg", None),
        ("s3://b/c d+%20.jpg", {"team": "x", "n": 3}),
        ("s3://b/猫.jpg", [1, 2]),
        ("https://h/x.jpg?a=1", None),
    ]
    assert not any(entry.error for entry in found)


@pytest.mark.parametrize("name", ["list.jsonl", "list.jsonl.gz", "header.csv", "header.csv.gz", "s3.csv", "list.txt"])
def test_each_cursor_goes_on_after_its_entry(tmp_path: Path, name: str) -> None:
    """Also after a row with a line break in quotes, and in compressed files."""
    data = {"list.jsonl": JSONL, "header.csv": CSV_HEADER.encode(), "s3.csv": CSV_S3.encode()}
    path = write(tmp_path, name, data.get(name.removesuffix(".gz"), b"# comment\ns3://b/a.jpg\n\ns3://b/b.jpg\n"))
    found = entries(path)
    assert len(found) >= 2
    for number, entry in enumerate(found, start=1):
        assert entries(path, entry.cursor) == found[number:]


@pytest.mark.parametrize(
    "line",
    [b"{", b"[]", b'"s3://b/a.jpg"', b'{"key": "a"}', b'{"image": 3}', b"\xff\xfe", b'{"image": NaN}', b"[" * 100_000],
)
def test_unreadable_json_line_becomes_an_error(tmp_path: Path, line: bytes) -> None:
    """The others are read, and the line differs from other unreadable lines."""
    found = entries(write(tmp_path, "list.jsonl", line + b'\n{"image": "s3://b/a.jpg"}\n{]\n'))
    assert [entry.reference for entry in found] == ["", "s3://b/a.jpg", ""]
    assert found[0].error.startswith("line 1: expected ")
    assert found[0].version != found[2].version


@pytest.mark.parametrize("data", [b"", b"\n\r\n"])
def test_csv_without_rows_has_no_entries(tmp_path: Path, data: bytes) -> None:
    assert entries(write(tmp_path, "list.csv", data)) == []


def test_csv_header_may_come_after_empty_lines(tmp_path: Path) -> None:
    found = entries(write(tmp_path, "list.csv", b"\nimage,team\ns3://b/a.jpg,x\n"))
    assert [(entry.reference, entry.metadata) for entry in found] == [("s3://b/a.jpg", {"team": "x"})]


@pytest.mark.parametrize("name", ["list.jsonl.gz", "list.txt.gz", "list.csv.gz"])
def test_damaged_gzip_is_refused(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, name, b"".join(b"s3://b/%d.jpg\n" % number for number in range(5000)))
    raw = bytearray(path.read_bytes())
    raw[300:320] = bytes(20)
    path.write_bytes(raw)
    with pytest.raises(SourceError, match="while decompressing"):
        entries(path)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("list.jsonl", '{"image": "https://user:hunter2@h/a.jpg?sign=hunter2"'),
        ("list.txt", '{"image": ["https://h/a.jpg?sign=hunter2"]}'),
    ],
)
def test_error_of_a_line_has_no_secrets_of_urls(tmp_path: Path, name: str, line: str) -> None:
    [entry] = entries(write(tmp_path, name, line.encode()))
    assert "h/a.jpg…" in entry.error
    assert "hunter2" not in entry.error


def test_error_of_a_header_has_no_secrets_of_urls(tmp_path: Path) -> None:
    path = write(tmp_path, "list.csv", b"1,2,3,https://h/a.jpg?sign=hunter2\n")
    with pytest.raises(SourceError, match="expected a header") as caught:
        entries(path)
    assert "hunter2" not in str(caught.value)


def test_csv_with_header_takes_other_columns_as_metadata(tmp_path: Path) -> None:
    found = entries(write(tmp_path, "list.csv", b"\xef\xbb\xbf" + CSV_HEADER.encode()))
    assert [(entry.reference, entry.metadata) for entry in found] == [
        ("s3://b/a.jpg", {"id": "1", "note": "two\nlines"}),
        ("s3://b/c,d.jpg", {"id": "2", "note": "x"}),
    ]


@pytest.mark.parametrize("header", ["", "Bucket,Key,VersionId\n"])
def test_csv_in_the_form_of_s3_is_percent_decoded(tmp_path: Path, header: str) -> None:
    found = entries(write(tmp_path, "list.csv", (header + CSV_S3).encode()))
    assert [entry.reference for entry in found] == ["s3://photos/a b/猫+.jpg", "s3://photos/c.jpg?versionId=v1"]


def test_csv_of_one_column_needs_no_header(tmp_path: Path) -> None:
    found = entries(write(tmp_path, "list.csv", b"s3://b/a.jpg\n\nhttps://h/b.jpg\n"))
    assert [entry.reference for entry in found] == ["s3://b/a.jpg", "https://h/b.jpg"]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.csv", b"name,size,width,height\n"),
        ("b.csv", b"\xff,x\n"),
        ("c.csv.gz", b""),
        ("none.jsonl", None),
        ("d", b""),
    ],
)
def test_unusable_list_is_refused(tmp_path: Path, name: str, data: bytes | None) -> None:
    path = tmp_path / name
    if data is not None:
        path.write_bytes(data or b"no gzip")
    with pytest.raises(SourceError, match=r"expected|Not a gzipped"):
        entries(path)


def test_error_names_the_line(tmp_path: Path) -> None:
    """Where a run goes on in the middle, the place in the file."""
    lines = [b'{"image": "s3://b/a"}\n', b"\n", b"no object\n", b"{}\n"]
    path = write(tmp_path, "list.jsonl", b"".join(lines))
    good, bad, last = entries(path)
    assert bad.error.startswith("line 3: expected a JSON object")
    assert last.error.startswith("line 4: expected an object")
    assert entries(path, good.cursor)[0].error.startswith("the line that ends at byte 33: expected a JSON object")
    [typed] = StandardInput(io.BytesIO(b"# list\n\xff\n")).entries("")
    assert typed.error.startswith("line 2: expected UTF-8")


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b'image\ns3://b/a\n"b\n', r"list\.csv, line 3: unexpected end of data"),
        (b"image\n\xff\n", r"list\.csv, line 2: expected UTF-8"),
        (b"image\n" + b"x" * (MAX_LINE_BYTES + 1), r"list\.csv, line 2: expected at most"),
    ],
    ids=["quote", "utf-8", "long"],
)
def test_error_of_csv_names_the_line(tmp_path: Path, data: bytes, text: str) -> None:
    with pytest.raises(SourceError, match=text):
        entries(write(tmp_path, "list.csv", data))


def test_standard_input_takes_references_and_json() -> None:
    """The cursor is a number of lines, because standard input cannot be read again from an offset."""
    data = b'# list\ns3://b/a b.jpg\n{"image": "s3://b/c.jpg", "n": 1}\n\n\xff\n'
    found = list(StandardInput(io.BytesIO(data)).entries(""))
    assert [entry.reference for entry in found] == ["s3://b/a b.jpg", "s3://b/c.jpg", ""]
    assert [entry.metadata for entry in found] == [None, {"n": 1}, None]
    for number, entry in enumerate(found, start=1):
        assert list(StandardInput(io.BytesIO(data)).entries(entry.cursor)) == found[number:]


def test_total_is_estimated_from_the_length_of_lines(tmp_path: Path) -> None:
    path = write(tmp_path, "list.jsonl", b'{"image": "s3://b/a.jpg"}\n' * 1000)
    source = open_source(str(path), objects=Objects({}))
    tenth = [entry.cursor for entry in source.entries("")][99]
    assert source.total(read=100, cursor=tenth) == 1000
    assert source.total(read=0, cursor="") is None
    source.close()
