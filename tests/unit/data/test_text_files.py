"""Tests which files of a source are read, how they are decoded, and what is refused."""

import gzip
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from unitransformer.data import documents
from unitransformer.data.documents import TextFile, read_documents, split_files
from unitransformer.data.text_files import TextSource, check_text, find_text

FRENCH = "naïve café déjà vu €\n" * 300
RUSSIAN = "сколько времени занимает один шаг\n" * 300
CJK = "日本語 中文。\n" * 300
PAGES = [{"id": n, "title": "a page", "text": f"page {n}: 日本, é\nand more"} for n in range(100)]


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding))
    return path


def find(source: Path, encoding: str = "utf-8", field: str | None = None) -> TextSource:
    found = find_text(str(source), encoding=encoding, field=field)
    check_text(found)
    return found


def read(files: Sequence[TextFile]) -> list[str]:
    return ["".join(document) for file in files for document in read_documents(file)]


def names_in(source: Path) -> list[str]:
    return [file.path.relative_to(source).as_posix() for file in find(source).files]


def refusal(source: Path, encoding: str = "utf-8", field: str | None = None) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        find(source, encoding, field)
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(f"{source.parent}/", "")


# ---- encodings


@pytest.mark.parametrize("block", [100, 1 << 20])
@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        (FRENCH, "utf-8"),
        (FRENCH, "utf-8-sig"),
        (FRENCH, "utf-16"),
        (FRENCH, "utf-16-le"),
        (RUSSIAN, "utf-16-be"),
        ("\u010a\u0a20\u0a0a ਪੰਜਾਬੀ\n" * 300, "utf-16-le"),  # bytes of a line feed in letters
        ("\u010a\u0a20\u0a0a ਪੰਜਾਬੀ\n" * 300, "utf-16-be"),
        ("😀 emoji\n" * 300, "utf-16-be"),
        ("中" * 3_000, "utf-16-le"),
        (CJK, "utf-32"),
        (FRENCH, "cp1252"),
        (RUSSIAN, "cp1251"),
        (RUSSIAN, "koi8-r"),
        (CJK, "gb18030"),
        ("𠀀中" * 3_000, "gb18030"),
        ("あ" * 3_000, "shift-jis"),
        ("繁體 中文\n" * 300, "big5"),
        ("한국어 모델\n" * 300, "euc-kr"),
        ("été là\n" * 300, "cp037"),
    ],
)
def test_both_parts_of_a_file_are_its_text_in_any_encoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, encoding: str, block: int
) -> None:
    monkeypatch.setattr(documents, "BLOCK_BYTES", block)
    source = find(write(tmp_path / "text.txt", text, encoding), encoding)
    (train,), (validation,) = map(read, split_files(source.files))
    assert train + validation == text
    assert len(validation) == pytest.approx(len(text) / 20, abs=40)


def test_a_byte_order_mark_is_not_part_of_the_text(tmp_path: Path) -> None:
    source = write(tmp_path / "text.txt", "\ufeffété\n")
    assert read(find(source).files) == ["été\n"]
    source.write_bytes("\ufeffété\n".encode("utf-16-be"))
    for encoding in ("utf-16", "utf-16-be"):
        assert read(find(source, encoding).files) == ["été\n"]


@pytest.mark.parametrize(
    ("content", "encoding", "message"),
    [
        (
            FRENCH.encode("cp1252"),
            "utf-8",
            "byte 0xef (invalid continuation byte) at offset 2; it may be cp1252: "
            "give --data-encoding cp1252",
        ),
        (
            RUSSIAN.encode("cp1251"),
            "utf-8",
            "byte 0xf1 (invalid continuation byte) at offset 0; it may be cp1251: "
            "give --data-encoding cp1251",
        ),
        (
            FRENCH.encode("utf-16"),
            "utf-8",
            "byte order mark of utf-16-le at offset 0; it may be utf-16-le: "
            "give --data-encoding utf-16-le",
        ),
        (
            b"plain text\n" * 50 + b"\0",
            "utf-8",
            "character U+0000 at offset 550; repair it or convert it to utf-8",
        ),
        (
            "“quoted”\n".encode("cp1252") * 50,
            "iso8859-1",
            "character U+0093 at offset 0; it may be cp1252 or cp1251: give --data-encoding cp1252",
        ),
        (
            FRENCH.encode(),
            "cp1252",
            "utf-8 text at offset 0; it may be utf-8: give --data-encoding utf-8",
        ),
        (
            "今天天气很好\n".encode() * 50,
            "gb18030",
            "utf-8 text at offset 0; it may be utf-8: give --data-encoding utf-8",
        ),
        (
            b"plain text\n" * 50,
            "utf-16-le",
            "8-bit text at offset 0; it may be utf-8: give --data-encoding utf-8",
        ),
        (
            FRENCH.encode("cp1252"),
            "utf-16",
            "no byte order mark at offset 0; it may be cp1252: give --data-encoding cp1252",
        ),
    ],
)
def test_text_in_another_encoding_is_refused_with_place_and_likely_encoding(
    tmp_path: Path, content: bytes, encoding: str, message: str
) -> None:
    source = tmp_path / "text.txt"
    source.write_bytes(content)
    assert refusal(source, encoding) == f"data text.txt is not {encoding} text: {message}"


def test_one_file_in_another_encoding_among_many_is_named(tmp_path: Path) -> None:
    for number in range(30):
        write(tmp_path / "texts" / f"{number:02}.txt", FRENCH)
    write(tmp_path / "texts" / "17.txt", FRENCH, "cp1252")
    assert refusal(tmp_path / "texts") == (
        "data texts/17.txt is not utf-8 text: byte 0xef (invalid continuation byte) at offset 2; "
        "it may be cp1252: convert it to utf-8, or give --data-encoding cp1252 if all files are "
        "(found in 1 of 30 files)"
    )


def test_a_wrong_byte_far_from_the_start_is_found_and_judged_by_its_surroundings(
    tmp_path: Path,
) -> None:
    source = tmp_path / "text.txt"
    source.write_bytes(b"plain text\n" * 200_000 + FRENCH.encode("cp1252"))
    message = refusal(source)
    assert "at offset 2200002; it may be cp1252: " in message


@pytest.mark.parametrize(
    ("first", "second", "reason"),
    [
        ("cp1252", "utf-8", "utf-8 text"),
        ("utf-8", "cp1252", "utf-8 text"),
        ("utf-16-le", "cp1252", "8-bit text"),
        ("utf-16-le", "utf-8", "utf-8 text"),
    ],
)
def test_a_file_that_changes_its_encoding_is_refused(
    tmp_path: Path, first: str, second: str, reason: str
) -> None:
    encoding = "cp1252" if first == "utf-8" else first
    source = tmp_path / "text.txt"
    text = "le garçon naïf a été là où brûle la forêt, déjà\n" * 200
    source.write_bytes(text.encode(first) + text.encode(second))
    message = refusal(source, encoding)
    assert message.startswith(f"data text.txt is not {encoding} text: {reason} at offset ")
    assert message.endswith(f"; repair it or convert it to {encoding}")


@pytest.mark.parametrize("encoding", ["gb18030", "cp866", "cp874", "shift-jis", "utf-16-le"])
def test_long_text_is_not_taken_for_utf8_by_chance(tmp_path: Path, encoding: str) -> None:
    letters = {
        "gb18030": (0x4E00, 0x9FA0),
        "cp866": (0x430, 0x450),
        "cp874": (0xE01, 0xE2F),
        "shift-jis": (0xFF66, 0xFF9E),
        "utf-16-le": (0x4E00, 0x9FA0),
    }
    first, stop = letters[encoding]
    points = np.random.default_rng(0).integers(first, stop, 500_000)
    source = write(tmp_path / "text.txt", "".join(map(chr, points)), encoding)
    assert len(find(source, encoding).files) == 1


def test_ascii_text_is_the_same_in_any_code_page(tmp_path: Path) -> None:
    source = write(tmp_path / "text.txt", "plain text\n" * 50)
    for encoding in ("ascii", "cp1251", "shift-jis", "gb18030", "utf-8"):
        assert read(find(source, encoding).files) == ["plain text\n" * 50]


# ---- files that are passed over


def test_files_without_text_are_counted_and_named(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    write(folder / "a.txt", "line\n" * 100)
    write(folder / "b.bin", "line\0\n" * 100)
    write(folder / "c.txt", "")
    write(folder / ".hidden", "secret\n")
    write(folder / ".git" / "config", "secret\n")
    for name in ("d.gz", "e/f.txt.gz"):
        write(folder / name, "").write_bytes(gzip.compress(b"line\n" * 100))
    found = find(folder)
    assert read(found.files) == ["line\n" * 100]
    assert found.description == (
        "texts, 1 file, 500 bytes; 3 files passed over: "
        "2 compressed (d.gz, e/f.txt.gz), 1 binary (b.bin)"
    )


def test_a_folder_without_text_is_refused_with_what_it_holds(tmp_path: Path) -> None:
    for number in range(5):
        write(tmp_path / "texts" / f"{number}.gz", "").write_bytes(gzip.compress(b"line\n"))
    assert refusal(tmp_path / "texts") == (
        f"data {tmp_path.name}/texts holds no text, but 5 compressed (0.gz, 1.gz, 2.gz, ...); "
        "unpack or convert them, or give text files that are not empty"
    ).replace(f"{tmp_path.name}/", "")


def test_a_home_is_found_and_a_name_with_a_tilde_is_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "~name" / "a.txt", "some text")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("~/~name", "./~name"):
        assert find_text(name, encoding="utf-8", field=None).num_bytes == len("some text")
    with pytest.raises(ValueError, match="'~name' does not exist; check the path: there is no"):
        find_text("~name", encoding="utf-8", field=None)


def test_a_name_that_cannot_be_printed_is_described(tmp_path: Path) -> None:
    source = write(tmp_path / "a\n\udcff.txt", "line\n")
    assert find(source).description == "a??.txt, 1 file, 5 bytes"
    write(tmp_path / "texts" / "a.txt", "line\n")
    (tmp_path / "texts" / os.fsdecode(b"b\xff\n.gz")).write_bytes(gzip.compress(b"line\n"))
    assert find(tmp_path / "texts").description.endswith("1 compressed (b??.gz)")


# ---- links


def test_links_to_folders_and_files_are_followed(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere" / "books" / "a.txt", "book\n")
    write(tmp_path / "elsewhere" / "b.txt", "text\n")
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "books").symlink_to("../elsewhere/books")
    (folder / "c.txt").symlink_to(tmp_path / "elsewhere" / "b.txt")
    (tmp_path / "link").symlink_to("texts")
    for source in (folder, tmp_path / "link"):
        assert names_in(source) == ["books/a.txt", "c.txt"]


def test_a_file_that_is_reached_in_two_ways_counts_once(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    write(folder / "real" / "a.txt", "text\n")
    (folder / "again").symlink_to("real")
    (folder / "and-again").symlink_to(folder / "real")
    (folder / "b.txt").symlink_to("real/a.txt")
    assert names_in(folder) == ["real/a.txt"]


def test_links_in_a_circle_are_passed_over(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    write(folder / "a" / "x.txt", "text\n")
    write(folder / "b" / "y.txt", "text\n")
    write(tmp_path / "outside.txt", "text\n")
    (folder / "a" / "to-b").symlink_to("../b")
    (folder / "b" / "to-a").symlink_to("../a")
    (folder / "self").symlink_to(".")
    (folder / "a" / "parent").symlink_to("../..")
    assert names_in(folder) == ["a/x.txt", "b/y.txt"]
    assert find(folder).description.endswith(
        "; 2 files passed over: 2 circular links (a/parent, self)"
    )


def test_broken_links_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    write(folder / "a.txt", "text\n")
    (folder / "gone.txt").symlink_to("nowhere")
    (folder / "x").symlink_to("y")
    (folder / "y").symlink_to("x")
    assert find(folder).description.endswith(
        "; 3 files passed over: 3 broken links (gone.txt, x, y)"
    )


# ---- JSON Lines


def write_pages(path: Path, extra: str = "", encoding: str = "utf-8") -> Path:
    lines = (json.dumps(page, ensure_ascii=False) for page in PAGES)
    return write(path, "\n".join(lines) + "\n" + extra, encoding)


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.JSONL", "a.json", "a.txt", "a"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "gb18030"])
def test_each_line_of_json_lines_is_a_document(tmp_path: Path, name: str, encoding: str) -> None:
    source = find(write_pages(tmp_path / name, encoding=encoding), encoding, "text")
    train, validation = split_files(source.files)
    assert read(train) + read(validation) == [page["text"] for page in PAGES]
    assert len(read(validation)) == 5
    assert source.description.endswith(", field text of 1 JSON Lines file")


def test_a_block_of_bytes_cuts_no_line_of_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "BLOCK_BYTES", 10)
    monkeypatch.setattr(documents, "MAX_LINE", 10)
    files = find(write_pages(tmp_path / "a.jsonl"), field="text").files
    train, validation = split_files(files)
    assert read(train) + read(validation) == [page["text"] for page in PAGES]
    size = len(json.dumps(PAGES[0], ensure_ascii=False).encode())
    for stop, count in ((size // 2, 0), (size + 1, 1), (size + 5, 1)):
        assert len(list(read_documents(files[0], stop=stop))) == count


def test_blank_lines_line_ends_of_windows_and_empty_texts_are_allowed(tmp_path: Path) -> None:
    source = write(
        tmp_path / "a.jsonl", '\r\n{"t": "a\\r\\nb"}\r\n\n{"t": ""}\n{"t": "c", "n": NaN}'
    )
    assert read(find(source, field="t").files) == ["a\r\nb", "c"]


def test_plain_text_beside_json_lines_is_read_too(tmp_path: Path) -> None:
    write_pages(tmp_path / "texts" / "a.jsonl")
    write(tmp_path / "texts" / "b.txt", "plain\n")
    write(tmp_path / "texts" / "c.json", json.dumps(PAGES, indent=1))
    documents = read(find(tmp_path / "texts", field="text").files)
    assert len(documents) == 102
    assert documents[100] == "plain\n"


@pytest.mark.parametrize(
    ("extra", "field", "message"),
    [
        (
            "",
            None,
            " is JSON Lines: choose a field with --data-field; its string fields are title, text",
        ),
        ("", "body", ", line 1 has no field body; its string fields are title, text"),
        ("", "id", ", line 1: id is 0; it must be text"),
        (
            '{"text": "a"',
            "text",
            ", line 101 is not JSON (Expecting ',' delimiter at column 13); correct or remove it",
        ),
        ("\n[1]", "text", ", line 102 is not a JSON object; correct or remove it"),
        ('{"text": null}', "text", ", line 101: text is null; it must be text"),
        ('{"text": "\\ud800"}', "text", ", line 101: text holds '\\ud800', half a character"),
        ("[" * 100_000, "text", ", line 101 is not JSON (maximum recursion depth exceeded"),
    ],
)
def test_json_lines_without_the_field_are_refused_with_the_line(
    tmp_path: Path, extra: str, field: str | None, message: str
) -> None:
    source = write_pages(tmp_path / "a.jsonl", extra)
    assert refusal(source, field=field).startswith(f"data a.jsonl{message}")


def test_json_lines_in_another_encoding_are_refused_before_they_are_parsed(tmp_path: Path) -> None:
    source = write_pages(tmp_path / "a.jsonl", encoding="gb18030")
    assert refusal(source, field="text").startswith("data a.jsonl is not utf-8 text: byte 0xc8 ")


def test_a_field_without_json_lines_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.json", json.dumps(PAGES, indent=1))
    assert refusal(tmp_path / "a.json", field="text").startswith(
        "data-field is text, but data a.json holds no JSON Lines file"
    )


def test_json_that_is_not_lines_is_plain_text(tmp_path: Path) -> None:
    log = '{"level": "info"}\nthe run starts\n'
    assert read(find(write(tmp_path / "log.txt", log)).files) == [log]
    text = json.dumps(PAGES, indent=1)
    assert read(find(write(tmp_path / "a.json", text)).files) == [text]
