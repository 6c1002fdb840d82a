"""Parts of pages that reports of data and of results share."""

import pytest
from markupsafe import Markup

from tests.html_pages import Reader
from usfmae_jax.reporting import pages


def test_tiles_show_counts_and_text_with_notes():
    page = pages.part("tiles", {"frames": 1234, "AUROC": "0.912", "<b>": 1}, {"AUROC": "0.894 to <0.929"})
    assert "<b>1,234</b><span>frames</span></div>" in page
    assert "<b>0.912</b><span>AUROC</span><small>0.894 to &lt;0.929</small>" in page
    assert "&lt;b&gt;" in page


def test_sections_have_links_and_empty_ones_are_left_out():
    found = {"All numbers": Markup("<p>1</p>"), "Nothing": Markup("\n "), "Where & how": Markup("<p>2</p>")}
    page = pages.part("sections", found)
    assert page.count("<section") == page.count("<a ") == 2
    assert 'href="#all-numbers"' in page
    assert 'id="all-numbers"' in page
    assert "Nothing" not in page


def test_notices_and_folds_are_nothing_without_content():
    assert pages.part("notice", "Please check", []) == pages.part("folded", "more", "") == ""
    assert "<li>&lt;i&gt;</li>" in pages.part("notice", "Please check", ["<i>"])


@pytest.mark.parametrize("made", [str, Markup.escape])
def test_no_character_that_turns_the_writing_reaches_a_page(tmp_path, made):
    name = made("a\u202egnp.png<\x07\u2066\u061c\ufeff\xad\u2028")
    rows = [[name, name]]
    pages.write(tmp_path / "page.html", "index.html", title=name, headline={name: 1}, rows=rows, anatomies=rows)
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert Reader(tmp_path / "page.html").text.count("a\\u202egnp.png<\\u0007\\u2066\\u061c\\ufeff\\u00ad\\u2028") == 7
    assert not set("\u202e\x07\u2066\u061c\ufeff\xad\u2028") & set(text)
