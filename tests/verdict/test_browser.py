"""The report of a comparison in a real browser: what it asks for, what its console says, how wide it is."""

import sys
from pathlib import Path

import pytest
import tiny_labelled

import ftjax

sys.path.insert(0, str(Path(__file__).parent))
import browser  # noqa: E402

WIDTHS = (400, 1400)
LAYOUT = """({
  page: document.documentElement.scrollWidth,
  images: [...document.images].map(i => [i.naturalWidth, Math.round(i.getBoundingClientRect().width)]),
  cut: [...document.querySelectorAll("p, td, li, h1, h2, pre, code")].filter(
    e => e.scrollWidth > e.clientWidth + 1 && e.clientWidth > 0 && getComputedStyle(e).display != "inline").length,
  tables: [...document.querySelectorAll(".wide")].map(e => e.getBoundingClientRect().height)})"""


@pytest.mark.slow
@pytest.mark.skipif(browser.CHROMIUM is None, reason="needs Chromium, which is not on this machine")
def test_the_page_loads_nothing_says_nothing_and_fits_a_phone(tmp_path):
    c = tiny_labelled.config(tmp_path, tiny_labelled.make(tmp_path / "base", "bert"), tuning__method="head")
    c.train.update(steps=8, eval_every=4, log_every=1, batch_size=16)
    c.data.buckets, c.compare.seeds = 1, 1
    c.compare.contenders = ("majority", {"name": "the head <&> of " + "a" * 60, "tuning.method": "head"})
    c.compare.curve_shots = (1, 2, 4, 8)
    ftjax.compare(c, say=lambda text: None)
    report = tmp_path / "run/verdict.html"
    with browser.Page() as page:
        for width in WIDTHS:
            page.open(report, width)
            found = page.value(LAYOUT)
            assert found["page"] <= width and found["cut"] == 0, found
            assert len(found["images"]) == 3 and all(w > 0 and shown > 300 for w, shown in found["images"])
            assert found["tables"] and min(found["tables"]) > 50
        assert len(page.requests) >= 2 * len(WIDTHS)
        assert all(url == report.resolve().as_uri() or url.startswith("data:") for url in page.requests)
        assert page.errors == []


@pytest.mark.skipif(browser.CHROMIUM is None, reason="needs Chromium, which is not on this machine")
def test_what_a_page_does_wrong_is_seen(tmp_path):
    file = tmp_path / "bad.html"
    file.write_text('<img src="http://elsewhere.test/a.png"><div style="width:900px">x</div><script>nothing()</script>')
    with browser.Page() as page:
        page.open(file, 400)
        assert any("elsewhere.test" in url for url in page.requests) and page.errors
        assert page.value(LAYOUT)["page"] > 400
