"""Parse the pages of reports."""

import base64
import json
from html.parser import HTMLParser
from xml.etree import ElementTree

from bissl_zoo.config import LazyConfig
from bissl_zoo.report.run import write_report

HOSTILE = '<script>alert("x")</script><img src=x onerror=alert(1)>\'"&{{7*7}}$x_1^2$'
_VOID = {"meta", "link", "img", "br", "input"}
_SVG = "data:image/svg+xml;base64,"


class Parsed(HTMLParser):
    """A page: its elements, the text of tables by cell, of charts, of problems, and of everything else."""

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.elements, self.open, self.rows, self.drawn, self.text, self.problems = [], [], [], [], [], []
        self.feed(page)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.elements.append((tag, attrs))
        if tag not in _VOID:
            self.open.append((tag, attrs))
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        elif tag == "img" and attrs["src"].startswith(_SVG):
            chart = ElementTree.fromstring(base64.b64decode(attrs["src"][len(_SVG) :]))
            self.drawn += [element.text for element in chart.iter("{http://www.w3.org/2000/svg}text")]

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        inside = [tag for tag, _ in self.open]
        if "td" in inside or "th" in inside:
            self.rows[-1][-1] += data
        if any("problem" in attrs.get("class", "") for _, attrs in self.open):
            self.problems.append(data)
        if not {"style", "script"} & set(inside):
            self.text.append(data)

    def table(self, *header):
        """Return the rows of the table with this header."""
        rest = self.rows[self.rows.index(list(header)) + 1 :]
        return [row for row in rest[: next((i for i, row in enumerate(rest) if len(row) != len(header)), None)]]


def report_of(folder, images=0, **options):
    """Return the page of a run as text."""
    page = folder.parent / f"{folder.name}.html"
    write_report(folder, page, images, **options)
    return page.read_text(encoding="utf-8")


def harmless(page):
    """Return the parsed page after checking that it runs and loads nothing."""
    parsed = Parsed(page)
    assert not {tag for tag, _ in parsed.elements} & {"script", "iframe", "object", "embed", "base", "form", "svg"}
    for tag, attrs in parsed.elements:
        assert not [name for name in attrs if name.startswith("on")], (tag, attrs)
        for name in ("src", "href", "action", "data", "poster"):
            assert attrs.get(name, "#").startswith(("#", "data:")), (tag, attrs)
        assert "url(" not in attrs.get("style", ""), attrs
    assert "http:" not in page and "https:" not in page and "@import" not in page
    return parsed


def small_run(folder, stages=("finetune",), **config):
    """Write a run directory without checkpoints or data, of a few lines."""
    folder.mkdir(parents=True)
    cfg = {"train": {"stages": list(stages)}, "bilevel": {"lower_steps": 3, "upper_steps": 2}, **config}
    LazyConfig.save(cfg, folder / "config.yaml")
    return folder


def write_records(folder, *records):
    """Write records of the stage finetune, 10 seconds apart."""
    lines = ({"stage": "finetune", "step": n, "time": 1e9 + 10 * n, **one} for n, one in enumerate(records, start=1))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
