"""Cards and MODEL_ZOO.md: complete, escaped, with tables and commands that work for any content."""

import re
import shlex
import shutil

import pytest
import yaml

from bissl_zoo.engine.publishing import publish_run
from bissl_zoo.zoo import EntryMetadata, Zoo
from bissl_zoo.zoo.card import format_metric, render_card, render_page, split_metric
from bissl_zoo.zoo.index import Index
from bissl_zoo.zoo.publish import entry_fields

MarkdownIt = pytest.importorskip("markdown_it", reason="a Markdown reader: pip install markdown-it-py").MarkdownIt

PAGE_FILES = {"model.safetensors": {"sha256": "0" * 64, "size": 10}}


def record(task="detection", metrics=None, **changes):
    return {
        "architecture": "resnet18",
        "pretext": "simclr",
        "task": task,
        "metrics": metrics or {},
        "created": "2026-01-02T03:04:05+00:00",
        "files": PAGE_FILES,
        **changes,
    }


def seeds(*values):
    return {"mean": sum(values) / len(values), "std": 0.01 if len(values) > 1 else None, "values": list(values)}


def tables(text):
    """Every table of a page as rows of cells, as parsed by a Markdown reader."""
    result, cells = [], None
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        if token.type == "table_open":
            result.append([])
        elif token.type == "tr_open":
            cells = []
        elif token.type == "inline" and cells is not None:
            cells.append(token.content)
        elif token.type == "tr_close":
            result[-1].append(cells)
            cells = None
    return result


def headings(text):
    tokens = MarkdownIt().parse(text)
    return [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]


def test_each_task_has_a_table_of_its_metrics_and_pretraining_is_last():
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
    assert headings(page)[1:] == [
        "Aligned with `detection`",
        "Aligned with `segmentation`",
        "Pretrained, without a task",
    ]
    detection, segmentation, pretrained = tables(page)
    assert detection[0] == ["entry", "architecture", "pretext", "AP50 (bissl)", "AP (bissl)", "published"]
    assert [row[0].partition("]")[0] for row in detection[1:]] == ["[det", "[det@2", "[det@10"]
    assert [row[3] for row in detection[1:]] == ["0.42 ± 0.01 (2 seeds)", "0.4", "-"]
    assert segmentation[1] == ["[seg](seg/README.md)", "resnet18", "simclr", "0.5", "2026-01-02"]
    assert pretrained[1] == ["[pre](pre/README.md)", "resnet18", "-", "-"]


@pytest.mark.parametrize(
    "text", ["a|b\n# b", "a\\|b`", "| --- |", "\x85x\u2028y", "<img src=x> [x](javascript:y) ![y](http://z/z.png)"]
)
def test_any_text_stays_in_its_cell_or_heading_without_markup(text):
    page = render_page(Index({"x": record(text, metrics={text: seeds(0.5)}, architecture=text, pretext=text)}))
    (table,) = tables(page)
    assert [len(row) for row in table] == [5, 5] and len(headings(page)) == 2
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(page)
    assert "<img" not in html and html.count("<a ") == 1 and 'href="x/README.md"' in html


def test_the_commands_repeat_each_entry():
    page = render_page(Index({"x": record(), "x@2": record(), "y": record(None)}))
    commands = [shlex.split(line) for line in page.splitlines() if line.startswith("bissl ")]
    assert [command[3] for command in commands] == ["zoo:x@1", "zoo:x@2", "zoo:y@1"]
    assert all(command[:3] == ["bissl", "train", "--config-file"] for command in commands)
    assert commands[1][4] == "train.output_dir=runs/x@2"


def test_the_commands_of_a_published_run_are_valid(finished, tool, tmp_path, capsys, monkeypatch, scenes):
    monkeypatch.setenv("BISSL_ZOO_DATASETS", str(scenes))
    monkeypatch.setenv("BISSL_ZOO", str(tmp_path / "zoo"))
    run = shutil.copytree(finished, tmp_path / "run")
    publish_run(run, name="tiny", zoo=Zoo(tmp_path / "zoo"))
    page = (tmp_path / "zoo" / "MODEL_ZOO.md").read_text()
    (command,) = [shlex.split(line) for line in page.splitlines() if line.startswith("bissl ")]
    assert tool.cli([*command[2:], "--dry-run"]) == 0, capsys.readouterr().err
    assert "test_resnet" in capsys.readouterr().out
    (table,) = tables(page)
    assert all(len(row) == len(table[0]) for row in table) and table[1][0] == "[tiny](tiny/README.md)"


def test_a_metric_has_four_digits_and_the_deviation_of_its_seeds():
    assert format_metric({}) == format_metric({"mean": None}) == "-"
    assert format_metric({"mean": 0.123456, "std": None, "values": [0.123456]}) == "0.1235"
    assert format_metric({"mean": 71.25, "std": 0.0312, "values": [1, 2, 3]}) == "71.25 ± 0.031 (3 seeds)"
    assert split_metric("AP50 (bissl)") == ("AP50", "bissl") and split_metric("top1") == ("top1", "")


PARENT = "ab" * 32


def make_entry(**metadata):
    fields = entry_fields(
        EntryMetadata(
            **{
                "pretext": "byol",
                "task": "faster_rcnn",
                "solver": "cg",
                "shared_stage": "c4",
                "metrics": {"AP50": [0.25, 0.75], "AP": [0.125, 0.125]},
                "seeds": [3, 4],
                "datasets": {"pretext": "digits", "test": {"name": "voc|07", "images": 4952}},
                "parents": [{"name": "base@1", "sha256": PARENT}],
                "licence": "CC-BY-4.0",
                **metadata,
            }
        )
    )
    pixels = {"input_size": [3, 96, 80], "mean": [0.5, 0.25, 0.1], "std": [0.2, 0.2, 0.3], "channel_order": "RGB"}
    files = {"model.safetensors": {"sha256": "c" * 64, "size": 1234567}}
    return {"name": "mine", "architecture": "resnet50", "input": pixels, "files": files, **fields}


def test_the_card_has_all_metadata():
    card = render_card(make_entry())
    for text in (
        "`resnet50`",
        "`byol`",
        "`faster_rcnn`",
        "`cg`",
        "`c4`",
        "| AP50 | 0.5 | 0.3536 | 0.25, 0.75 |",  # sample deviation of 0.25 and 0.75: 0.5 / sqrt(2)
        "| AP | 0.125 | 0 | 0.125, 0.125 |",
        "Seeds: 3, 4.",
        "| test | voc&#124;07 | images: 4952 |",
        "3 x 96 x 80",
        "(0.5, 0.25, 0.1)",
        PARENT,
        "Licence: CC-BY-4.0.",
        "| `model.safetensors` | 1,234,567 | `" + "c" * 64 + "` |",
    ):
        assert text in card


def test_the_front_matter_is_yaml_with_the_fields_of_a_model_hub():
    card = render_card(make_entry())
    front_matter = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)[1])
    assert front_matter["license"] == "cc-by-4.0"
    assert front_matter["library_name"] == "timm"
    assert front_matter["pipeline_tag"] == "image-feature-extraction"
    assert {"timm", "bissl", "byol", "faster_rcnn"} <= set(front_matter["tags"])


def test_the_python_of_the_card_compiles_and_pins_the_version():
    for name, pinned in (("mine", "mine@1"), ("mine@2", "mine@2")):
        blocks = re.findall(r"```python\n(.*?)```", render_card({**make_entry(), "name": name}), re.DOTALL)
        assert len(blocks) == 2
        for block in blocks:
            compile(block, "card", "exec")
        assert f'create_backbone("{pinned}"' in blocks[0]
        assert f'"local-dir:path/to/{name}"' in blocks[1]


def test_missing_metadata_is_left_out_of_the_card():
    bare = dict.fromkeys(("pretext", "task", "solver", "shared_stage"))
    card = render_card(make_entry(**bare, parents=[], metrics={}, seeds=[], datasets={}, licence="unknown"))
    assert "None" not in card and "## Metrics" not in card and "## Data" not in card
    assert "Started from random weights." in card
    assert "Licence: unknown." in card


def test_metadata_have_versions_the_time_in_utc_and_one_value_per_seed():
    fields = entry_fields({"metrics": {"top1": 0.5}, "seeds": [0]})
    assert fields["metrics"]["top1"] == {"mean": 0.5, "std": None, "values": [0.5]}
    assert set(fields["versions"]) == {"bissl_zoo", "torch", "timm", "python"}
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", fields["created"])
