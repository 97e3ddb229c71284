"""Tests which bytes count as text, and which encoding is suggested for those that do not."""

import codecs
import gzip
import pickle
from collections.abc import Iterable

import numpy as np
import pytest

from unitransformer.data.text_encoding import find_fault, likely_encodings, passed_over_kind

FRENCH = "le garçon naïf déjà là où l'été brûle la forêt\n" * 40
GERMAN = "über die Straße gehen viele Mädchen; das Gespräch war schön\n" * 40
POLISH = "zażółć gęślą jaźń, chrząszcz brzmi w trzcinie i Szczebrzeszyn z tego słynie\n" * 40
HEBREW = "שלום לכולם היום אנחנו לומדים איך מחשבים קוראים טקסט בעברית\n" * 40
ARABIC = "مرحبا بكم في هذا النص العربي الذي يستخدم لتدريب النموذج على الحاسوب\n" * 40
RUSSIAN = "сколько времени занимает один шаг обучения модели\n" * 40
JAPANESE = "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ\n" * 40
CHINESE = "今天天气很好。我们在这台机器上训练一个模型\n" * 40
TAIWANESE = "今天天氣很好。我們在這台機器上訓練一個模型\n" * 40
KOREAN = "이 기계에서 모델을 훈련하는 데 얼마나 많은 시간이 걸리는지 알아보자\n" * 40


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        (FRENCH, "latin-1"),
        (FRENCH, "cp1252"),
        (GERMAN, "latin-1"),
        ("he said “hello” — it\u2019s …\n" * 9, "cp1252"),
        ("plain text\n" * 9_000 + "café\n", "latin-1"),
        (RUSSIAN, "cp1251"),
        (RUSSIAN, "koi8-r"),
        (RUSSIAN, "iso8859-5"),
        (JAPANESE, "shift-jis"),
        (JAPANESE, "euc-jp"),
        (CHINESE, "gb18030"),
        (TAIWANESE, "big5"),
        (KOREAN, "euc-kr"),
        (POLISH, "cp1250"),
        (HEBREW, "cp1255"),
        (ARABIC, "cp1256"),
        (FRENCH, "utf-16-le"),
        (RUSSIAN, "utf-16-be"),
        (CHINESE, "utf-16-le"),
        (FRENCH, "utf-32-be"),
    ],
)
def test_text_in_another_encoding_has_a_fault_and_its_encoding_is_suggested(
    text: str, encoding: str
) -> None:
    content = text.encode(encoding)
    assert find_fault([content], "utf-8") is not None
    likely = likely_encodings(content, "utf-8")
    assert content.decode(likely[0]) == text
    assert encoding in likely


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_a_byte_order_mark_gives_the_encoding_away(encoding: str) -> None:
    marks = {"utf-8": codecs.BOM_UTF8, "utf-16-le": codecs.BOM_UTF16_LE}
    marks |= {"utf-16-be": codecs.BOM_UTF16_BE, "utf-32-le": codecs.BOM_UTF32_LE}
    content = marks.get(encoding, codecs.BOM_UTF32_BE) + "été".encode(encoding)
    assert find_fault([content], "cp1252") == (0, f"byte order mark of {encoding}")
    assert likely_encodings(content, "cp1252") == (encoding,)


@pytest.mark.parametrize(
    ("blocks", "encoding", "fault"),
    [
        ([b"caf\xe9 au lait"], "utf-8", (3, "byte 0xe9 (invalid continuation byte)")),
        ([b"abc\xc3", b"\xa9def\xc3", b"x"], "utf-8", (8, "byte 0xc3 (invalid continuation byte)")),
        ([b"abc\xc3", b"\xa9\xc3"], "utf-8", (5, "byte 0xc3 (unexpected end of data)")),
        ([b"abc", b"\xe9\0def"], "cp1252", (4, "character U+0000")),
        (["né\0".encode()], "utf-8", (3, "character U+0000")),
        ([b"a\0b\0c"], "utf-16-le", (4, "byte 0x63 (truncated data)")),
        ([b"a\0\n\0"], "utf-16-be", (2, "character U+0A00")),
        ([b"a\0\n\0"], "utf-16", (0, "no byte order mark")),
        ([b"it\x92s"], "iso8859-1", (2, "character U+0092")),
        ([b"\x1b$B$\"\x1b(B"], "utf-8", (0, "character U+001B")),
        ([b"\x82\xa0\x82"], "shift-jis", (2, "byte 0x82 (incomplete multibyte sequence)")),
    ],
)  # fmt: skip
def test_a_fault_is_the_first_wrong_byte_of_the_file(
    blocks: Iterable[bytes], encoding: str, fault: tuple[int, str]
) -> None:
    assert find_fault(blocks, encoding) == fault


@pytest.mark.parametrize(
    "content", ["log \x1b[31mred\x1b[0m\x01\n", "", "\x85\u2028\ufeff\ufffd\n"]
)
def test_control_characters_of_utf8_text_are_no_fault(content: str) -> None:
    assert find_fault([content.encode()], "utf-8") is None


def test_damaged_utf8_gets_no_suggestion() -> None:
    content = FRENCH.encode() + b"\xff" + FRENCH.encode()
    assert likely_encodings(content, "utf-8") == ()
    assert likely_encodings(content, "cp1252") == ("utf-8",)


random = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("suffix", "head", "kind"),
    [
        (".txt", b"text\n", None),
        (".txt", b"", None),
        (".gz", gzip.compress(b"text", mtime=0), "compressed"),
        (".zip", b"PK\x03\x04" + bytes(40), "compressed"),
        (".pt", b"PK\x03\x04" + bytes(40), "binary"),
        (".pdf", b"%PDF-1.4\n" + b"text " * 99, "binary"),
        (".parquet", b"PAR1\x15\x04" + b"text " * 99, "binary"),
        (".png", b"\x89PNG\r\n\x1a\n", "binary"),
        (".jpg", b"\xff\xd8\xff\xe0", "binary"),
        (".pkl", pickle.dumps("text " * 99), "binary"),
        (".bin", np.arange(4096, dtype=np.uint16).tobytes(), "binary"),
        (".bin", random.integers(0, 50_257, 4096).astype(np.uint16).tobytes(), "binary"),
        (".bin", random.normal(size=2048).astype(np.float32).tobytes(), "binary"),
        (".bin", b"line\0\n" * 100, "binary"),
        (".wav", (9e3 * np.sin(np.arange(4096) / 20)).astype(np.int16).tobytes(), "binary"),
        # Text in another encoding is not passed over but refused later.
        (".txt", FRENCH.encode("latin-1"), None),
        (".txt", FRENCH.encode("utf-16"), None),
        (".txt", FRENCH.encode("utf-16-be"), None),
        (".txt", RUSSIAN.encode("utf-16-le"), None),
        (".txt", CHINESE.encode("utf-32-le"), None),
        (".txt", CHINESE.encode("gb18030"), None),
        (".txt", b"text " * 99 + b"\0", None),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "cp1252", "gb18030"])
def test_compressed_and_binary_files_are_known_whatever_the_encoding(
    suffix: str, head: bytes, kind: str | None, encoding: str
) -> None:
    assert passed_over_kind(suffix, head[:8192], encoding) == kind
