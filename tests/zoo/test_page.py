"""MODEL_ZOO.md: whole tables whatever is in the index, one section per task, commands that run."""

import shlex
import shutil

import pytest

from bissl_zoo.engine.publishing import publish_run
from bissl_zoo.zoo import Zoo
from bissl_zoo.zoo.index import Index
from bissl_zoo.zoo.page import format_metric, markdown_table, render_page, split_metric

MarkdownIt = pytest.importorskip("markdown_it", reason="a Markdown reader: pip install markdown-it-py").MarkdownIt

FILES = {"model.safetensors": {"sha256": "0" * 64, "size": 10}}


def record(task="detection", metrics=None, **changes):
    return {
        "architecture": "resnet18",
        "pretext": "simclr",
        "task": task,
        "metrics": metrics or {},
        "created": "2026-01-02T03:04:05+00:00",
        "files": FILES,
        **changes,
    }


def seeds(*values):
    return {"mean": sum(values) / len(values), "std": 0.01 if len(values) > 1 else None, "values": list(values)}


def tables(text):
    """Every table of a page as rows of cells, as a Markdown reader sees it."""
    found, cells = [], None
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            cells = []
        elif token.type == "inline" and cells is not None:
            cells.append(token.content)
        elif token.type == "tr_close":
            found[-1].append(cells)
            cells = None
    return found


def headings(text):
    tokens = MarkdownIt().parse(text)
    return [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]


def test_an_empty_zoo_says_so():
    assert render_page(Index()).endswith("It holds no entries yet.\n")
    assert headings(render_page(Index())) == ["Model zoo"]


def test_each_task_has_its_table_with_its_own_metrics_and_pretraining_comes_last():
    page = render_page(
        Index(
            {
                "seg": record("segmentation", {"mIoU (bissl)": seeds(0.5)}),
                "det": record(metrics={"AP50 (bissl)": seeds(0.41, 0.43)}),
                "det@2": record(metrics={"AP50 (bissl)": seeds(0.4), "AP (bissl)": seeds(0.2)}),
                "det@10": record(),
                "pre": record(None, created=None, pretext=None),
            }
        )
    )
    assert headings(page) == [
        "Model zoo",
        "Aligned with `detection`",
        "Aligned with `segmentation`",
        "Pretrained, without a task",
    ]
    detection, segmentation, pretrained = tables(page)
    assert detection[0] == ["entry", "architecture", "pretext", "AP50 (bissl)", "AP (bissl)", "published"]
    assert [row[0] for row in detection[1:]] == [
        "[det](det/README.md)",
        "[det@2](det@2/README.md)",
        "[det@10](det@10/README.md)",
    ]
    assert [row[3] for row in detection[1:]] == ["0.42 ± 0.01 (2 seeds)", "0.4", "-"]
    assert segmentation[1] == ["[seg](seg/README.md)", "resnet18", "simclr", "0.5", "2026-01-02"]
    assert pretrained[1] == ["[pre](pre/README.md)", "resnet18", "-", "-"]


@pytest.mark.parametrize("text", ["a|b", "a\nb", "a\\|b", "a\\", "`a|b`", "| --- |", "\r\n\r\n# x", "\x85x\u2028y"])
def test_a_cell_stays_one_cell_whatever_it_holds(text):
    page = render_page(Index({"x": record(metrics={text: seeds(0.5)}, architecture=text)}))
    (table,) = tables(page)
    assert [len(row) for row in table] == [5, 5]
    assert headings(page) == ["Model zoo", "Aligned with `detection`"]


@pytest.mark.parametrize("task", ["a`b", "a\nb", "# a", "<script>alert(1)</script>", "](javascript:alert(1))"])
def test_a_task_stays_one_heading_whatever_it_is_called(task):
    page = render_page(Index({"x": record(task)}))
    assert len(headings(page)) == 2 and len(tables(page)) == 1
    assert "<script>" not in MarkdownIt().render(page).replace("&lt;script&gt;", "")


def test_links_and_html_of_a_record_are_text():
    hostile = "<img src=x onerror=alert(1)> [x](javascript:alert(1)) ![y](http://evil.example/z.png)"
    page = render_page(Index({"x": record(metrics={hostile: seeds(0.5)}, pretext=hostile, architecture=hostile)}))
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(page)
    assert "<img" not in html and 'javascript:alert(1)"' not in html
    assert html.count("<a ") == 1 and 'href="x/README.md"' in html


def test_the_commands_repeat_each_entry():
    page = render_page(Index({"x": record(), "x@2": record(), "y": record(None)}))
    commands = [shlex.split(line) for line in page.splitlines() if line.startswith("python ")]
    assert [command[3] for command in commands] == ["zoo:x@1", "zoo:x@2", "zoo:y@1"]
    assert all(command[:3] == ["python", "tools/train_net.py", "--config-file"] for command in commands)
    assert commands[1][4] == "train.output_dir=runs/x@2"


def test_the_commands_of_a_published_run_plan_the_same_run(finished, tool, tmp_path, capsys, monkeypatch, scenes):
    monkeypatch.setenv("BISSL_ZOO_DATASETS", str(scenes))
    monkeypatch.setenv("BISSL_ZOO", str(tmp_path / "zoo"))
    run = shutil.copytree(finished, tmp_path / "run")
    publish_run(run, name="tiny", zoo=Zoo(tmp_path / "zoo"))
    page = (tmp_path / "zoo" / "MODEL_ZOO.md").read_text()
    (command,) = [shlex.split(line) for line in page.splitlines() if line.startswith("python ")]
    assert tool.cli([*command[2:], "--dry-run"]) == 0, capsys.readouterr().err
    assert "test_resnet" in capsys.readouterr().out
    (table,) = tables(page)
    assert all(len(row) == len(table[0]) for row in table) and table[1][0] == "[tiny](tiny/README.md)"


def test_numbers_have_four_digits_and_the_spread_of_their_seeds():
    assert format_metric(None) == format_metric({}) == "-"
    assert format_metric({"mean": 0.123456, "std": None, "values": [0.123456]}) == "0.1235"
    assert format_metric({"mean": 71.25, "std": 0.0312, "values": [1, 2, 3]}) == "71.25 ± 0.031 (3 seeds)"
    assert format_metric({"mean": None}) == "-"


def test_a_metric_names_what_it_was_fine_tuned_from():
    assert split_metric("AP50 (bissl)") == ("AP50", "bissl")
    assert split_metric("top1") == ("top1", "")
    assert split_metric("F1 (macro) (bissl)") == ("F1", "macro) (bissl")


def test_a_table_has_as_many_cells_in_each_row():
    assert markdown_table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"
