"""Tests the tables of `predict`, as text and as HTML."""

from scaling.prediction.page import Table, render_page, text_of

TABLE = Table(header=["devices", "step s", "from"], rows=[["8", "1 (0.8 to 1.25)", "a <b>"]])


def test_a_block_is_text_with_its_tables() -> None:
    title, header, _, row = text_of(["fastest", TABLE]).splitlines()
    assert title == "fastest"
    assert header.split("  ")[-1].strip() == "from"
    assert row.split(maxsplit=1)[1].strip() == "1 (0.8 to 1.25)  a <b>"


def test_a_page_has_the_answer_before_the_figure_and_escapes_text() -> None:
    blocks = [["8 < 9"], [TABLE], ["last"]]
    page = render_page("t", b"<?xml?><svg></svg>", blocks, before=2).decode()
    assert "<p>8 &lt; 9</p>" in page
    assert "<td>1<br>(0.8 to 1.25)</td><td class=left>a &lt;b&gt;</td>" in page
    assert page.index("</table>") < page.index("<svg>") < page.index("<p>last</p>")
    assert "<?xml" not in page
