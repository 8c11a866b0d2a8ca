"""The HTML page of a zoo."""

import pytest
from browser import browser, find_browser
from report_pages import HOSTILE, Parsed

from bissl_zoo.report.zoo import zoo_page


def record(mean, size, **changes):
    metrics = {} if mean is None else {"AP50 (bissl)": {"mean": mean, "std": None, "values": [mean]}}
    files = {"model.safetensors": {"sha256": "0" * 64, "size": size}}
    return {
        "architecture": "resnet18",
        "pretext": "simclr",
        "licence": "MIT",
        "metrics": metrics,
        "files": files,
        **changes,
    }


RECORDS = {
    "b": record(0.5, 9_000_000),
    "a": record(0.25, 10_000_000, pretext="byol"),
    "c": record(
        None, 200_000_000, architecture=HOSTILE, licence=HOSTILE, metrics={HOSTILE: {"mean": 1.0, "std": None}}
    ),
}


def test_a_zoo_is_a_plain_table_with_its_metrics():
    page = zoo_page(RECORDS, HOSTILE, {"a": "voc", "c": HOSTILE})
    parsed = Parsed(page)
    assert [tag for tag, _ in parsed.elements].count("script") == 1 and "http" not in page.replace("http-equiv", "")
    assert not [name for _, attrs in parsed.elements for name in attrs if name.startswith("on")]
    rows = {row[0]: row for row in parsed.rows[1:]}
    header = parsed.rows[0]
    assert header[:7] == ["entry", "architecture", "pretext", "task", "solver", "licence", "data"]
    assert rows["b"][header.index("AP50 (bissl)")] == "0.5" and rows["c"][header.index("AP50 (bissl)")] == "\u2013"
    assert rows["c"][1] == rows["c"][6] == HOSTILE and rows["a"][header.index("size (MB)")] == "10.0"


@pytest.mark.slow
@pytest.mark.skipif(find_browser() is None, reason="needs Chromium: apt-get install chromium")
def test_a_zoo_is_sorted_and_filtered_in_the_browser(tmp_path):
    path = tmp_path / "zoo.html"
    path.write_text(zoo_page(RECORDS, "here", {"a": "voc"}), encoding="utf-8")
    order = "[...document.querySelectorAll('tbody tr')].filter((r) => !r.hidden).map((r) => r.cells[0].textContent)"
    button = "[...document.querySelectorAll('th button')].find((b) => b.textContent.startsWith('%s')).click()"
    with browser() as page:
        page.open(path, 390)
        assert page.value("document.documentElement.scrollWidth") <= 390
        assert page.value(order) == ["a", "b", "c"]
        page.value(button % "size")
        assert page.value(order) == ["b", "a", "c"]  # as numbers
        page.value(button % "AP50")
        assert page.value(order) == ["a", "b", "c"]
        page.value(button % "AP50")
        assert page.value(order) == ["b", "a", "c"]  # what has none comes last either way
        page.value(
            "const i = document.getElementById('filter'); i.value = 'BYOL voc'; i.dispatchEvent(new Event('input'))"
        )
        assert page.value(order) == ["a"] and page.value("document.getElementById('count').textContent") == "1 of 3"
        assert page.complaints == []
