"""Parts of pages that reports of data and of results share."""

from usfmae_jax.reporting import markup


def test_tiles_show_counts_and_text_with_notes():
    page = markup.tiles({"frames": 1234, "AUROC": "0.912", "<b>": 1}, {"AUROC": "0.894 to <0.929"})
    assert "<b>1,234</b><span>frames</span></div>" in page
    assert "<b>0.912</b><span>AUROC</span><small>0.894 to &lt;0.929</small>" in page
    assert "&lt;b&gt;" in page


def test_sections_have_links_and_empty_ones_are_left_out():
    page = markup.sections({"All numbers": "<p>1</p>", "Nothing": "", "Where & how": "<p>2</p>"})
    assert page.count("<section") == page.count("<a ") == 2
    assert 'href="#all-numbers"' in page
    assert 'id="all-numbers"' in page
    assert "Nothing" not in page


def test_notices_and_folds_are_nothing_without_content():
    assert markup.notice("Please check", []) == markup.folded("more", "") == ""
    assert "<li>&lt;i&gt;</li>" in markup.notice("Please check", ["<i>"])
