"""Tables for notebooks."""

from __future__ import annotations

from leattn.table import PRE, TEXT, html_table


def test_a_table_has_a_caption_above_and_a_note_below():
    html = html_table(["a"], [["x"]], "<below>", caption="<above>")
    assert html.startswith("<p>&lt;above&gt;</p><table>")
    assert html.endswith("</table><p>&lt;below&gt;</p>")
    assert html_table([], [("x", "y")]) == f"<table><tr><td style='{TEXT}'>x</td><td style='{TEXT}'>y</td></tr></table>"
    assert html_table([], []) == "<table></table>"


def test_cells_are_escaped_and_floats_are_short():
    html = html_table(["<th>"], [("<script>", 0.12345, 3, None)])
    assert [cell in html for cell in ("&lt;th&gt;", "&lt;script&gt;", ">0.123<", ">3<", ">None<")] == [True] * 5
    assert "<script>" not in html


def test_signs_stand_below_one_another_and_one_cell_goes_across():
    html = html_table(["node", "sees"], [("a", "■⬚"), ("… 3 more",)], pre=[1, 0])
    assert f"<td style='{PRE}'>■⬚</td>" in html
    assert f"<td colspan='2' style='{TEXT}'>… 3 more</td>" in html
    assert "colspan" not in html_table(["only"], [("a",)])
