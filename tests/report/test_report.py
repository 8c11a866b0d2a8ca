"""Reports of runs in any state: the metrics of the files, nothing unescaped, nothing loaded from outside."""

import json
import shutil

import pytest
import torch
from browser import browser, find_browser
from report_pages import HOSTILE, Parsed, harmless, report_of, small_run, write_records

from bissl_zoo.engine.evaluate import DETAILS_FILE, Details, write_details
from bissl_zoo.errors import CheckpointError
from bissl_zoo.report import report_after
from bissl_zoo.report.run import changed_keys, shipped_config, write_report
from bissl_zoo.runs.directory import load_run_config

needs_browser = pytest.mark.skipif(find_browser() is None, reason="needs Chromium: apt-get install chromium")


def edit_lines(path, change):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(change(line)) + "\n" for line in lines))


@pytest.fixture(scope="module")
def whole(finished, scenes, tmp_path_factory):
    """Return the report of a finished run with images, and the number of missing parts."""
    output = tmp_path_factory.mktemp("report") / "report.html"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BISSL_ZOO_DATASETS", str(scenes))
        missing = write_report(finished, output, images=8)
    return output, missing


@pytest.mark.slow
def test_the_tables_hold_the_metrics_of_the_files(whole, finished):
    output, missing = whole
    parsed = harmless(output.read_text(encoding="utf-8"))
    assert (missing, parsed.problems) == (0, [])
    results = json.loads((finished / "results.json").read_text())
    names = [name for name in results["bissl"] if "/" not in name]
    rows = {row[0]: row[1:] for row in parsed.table("fine-tuned from", *names)}
    for start, metrics in results.items():
        assert rows[start] == [f"{metrics[name]:.4f}" for name in names]
    assert rows["bissl minus pretrained"] == [f"{results['bissl'][n] - results['pretrained'][n]:+.4f}" for n in names]
    steps = {row[0]: row[1:4] for row in parsed.rows if len(row) == 9}
    assert steps["bissl"] == ["2", "2", "yes"]
    assert {"pretrain", "head_warmup", "bissl", "finetune_pretrained", "finetune"} < steps.keys()
    by_class = json.loads((finished / DETAILS_FILE).read_text())["bissl"]["per_class"]
    cells = {row[0]: row for row in parsed.rows if len(row) == 7 and row[0] in by_class}
    assert cells.keys() == by_class.keys()
    for name, metrics in by_class.items():
        assert cells[name][2::2] == [f"{metrics[key]:.4f}" for key in ("AP", "AP50", "AP75")]


@pytest.mark.slow
def test_the_charts_name_their_axes_and_links_lead_to_sections(whole):
    parsed = Parsed(whole[0].read_text(encoding="utf-8"))
    drawn = set(parsed.drawn)
    assert {"loss", "steps of pretrain", "alternations of bissl", "upper steps of bissl", "relative residual"} <= drawn
    assert {"cosine", "|x| / |v|", "steps of fine-tuning", "from pretrained", "from bissl"} <= drawn
    names = [attrs["id"] for _, attrs in parsed.elements if "id" in attrs]
    assert len(names) == len(set(names))
    links = [attrs["href"] for tag, attrs in parsed.elements if tag == "a"]
    assert links == [f"#{name}" for name in names]


@pytest.mark.slow
@pytest.mark.parametrize("gone", ["metrics.jsonl", "results.json", "checkpoints", "config.yaml"])
def test_missing_parts_of_a_run_are_reported(run_copy, gone):
    path = run_copy / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    parsed = harmless(report_of(run_copy))
    text = " ".join(parsed.text)
    expected = {
        "metrics.jsonl": "No loss has been written yet.",
        "results.json": "There are no results yet",
        "checkpoints": "no checkpoint",
        "config.yaml": "cannot read this config file",
    }
    assert expected[gone] in text
    assert "Environment." in text


@pytest.mark.slow
def test_missing_data_is_reported_in_place_of_its_images(finished, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("BISSL_ZOO_DATASETS", str(tmp_path / "file" / "nowhere"))
    missing = write_report(finished, tmp_path / "report.html", images=8)
    parsed = harmless((tmp_path / "report.html").read_text())
    assert missing == len(parsed.problems) == 4  # samples, views, features, predictions
    assert all(str(tmp_path / "file") in problem for problem in parsed.problems)
    assert len([record for record in caplog.records if record.message.startswith("report of finished, ")]) == 4
    assert "loss" in parsed.drawn


@pytest.mark.slow
def test_a_hostile_run_gives_a_page_of_plain_text(run_copy, tmp_path):
    run = run_copy.rename(tmp_path / HOSTILE.replace("/", "\u2215"))
    cfg = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(cfg + f"\nmine: {json.dumps({HOSTILE: HOSTILE})}\n")
    key = f"test/{HOSTILE.replace('/', '')}"
    odd = {"test/\ud800\uffff\x00]]>": 0.25, "solver/status": HOSTILE}
    edit_lines(run / "metrics.jsonl", lambda line: {**line, key: 0.5, **odd})
    results = json.loads((run / "results.json").read_text())
    (run / "results.json").write_text(json.dumps({HOSTILE: {HOSTILE.replace("/", ""): 0.5}, **results}))
    per_class = {f"{HOSTILE}{n}": {"AP50": 0.1 * n, HOSTILE: 0.5} for n in range(4)}
    write_details(run, {HOSTILE: Details(per_class, [HOSTILE, "]]>", "-->"], [[1, 2, 3]] * 3)})
    (run / "environment.txt").write_text(f"command: {HOSTILE}\npython: </table>{HOSTILE}\n")
    entry = {"name": HOSTILE, "location": "javascript:alert(1)", "sha256": "0" * 64}
    (run / "zoo_entry.json").write_text(json.dumps(entry))
    parsed = harmless(report_of(run))
    text = "".join(parsed.text)
    assert text.count(HOSTILE) > 10 and "49$x" not in text
    assert {key, "test/\ufffd\ufffd\\u0000]]>"} <= set(parsed.drawn) and f"from {HOSTILE}" in " ".join(parsed.text)


def test_the_sentence_about_the_hypergradients_is_shown_with_their_charts(tmp_path):
    run = small_run(tmp_path / "run", stages=["bissl"])
    upper = {"stage": "bissl", "step": 1, "upper_step": 1, "solver/cos_xv": 0.5, "solver/norm_ratio": 1.5}
    write_records(run, upper, {"stage": "bissl", "event": "stage_end", "summary": HOSTILE})
    parsed = harmless(report_of(run))
    assert {"cosine", "|x| / |v|"} <= set(parsed.drawn)
    assert HOSTILE in parsed.text[: parsed.text.index("Training")]  # below the verdict


@pytest.mark.slow
def test_the_shipped_config_of_a_run_is_its_base(finished):
    cfg = load_run_config(finished)
    base, rows = changed_keys(cfg, "command: train_net.py --config-file quickstart/digit_scenes_det.py x=1\n")
    assert base == "configs/quickstart/digit_scenes_det.py" and ["bilevel.alternations", 12, 2] in rows
    base, rows = changed_keys(cfg, "")
    assert base == "configs/common/train.py" and ["bilevel.alternations", 500, 2] in rows
    assert all(key.split(".")[0] in ("train", "pretrain", "bilevel", "finetune", "clip_grad") for key, *_ in rows)


@pytest.mark.parametrize("command", ["a.py", "../../evil.py", "/etc/passwd", "'unclosed", "", "--config-file"])
def test_only_shipped_configs_are_opened(command):
    assert shipped_config(f"command: train_net.py --config-file {command}") is None


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="There is no run in"):
        write_report(tmp_path, tmp_path / "x.html")


@pytest.mark.slow
def test_the_end_of_a_run_writes_its_report_and_keeps_random_states(train_net, tiny, tmp_path):
    changed = {"train__stages": "[finetune]", "train__publish__name": "null", "train__report": "true"}
    outcome = train_net(*tiny(**changed), f"train.output_dir={tmp_path / 'run'}")
    assert outcome.status == 0 and f"report {tmp_path / 'run' / 'report.html'}" in outcome.out
    parsed = harmless((tmp_path / "run" / "report.html").read_text())
    assert parsed.problems == [] and "finished" in parsed.text and "running" not in parsed.text
    assert len([tag for tag, attrs in parsed.elements if tag == "img"]) >= 2
    state = torch.get_rng_state()
    report_after(tmp_path / "run")
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow
def test_a_report_that_fails_is_a_warning(finished, caplog, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("no ink")

    monkeypatch.setattr("bissl_zoo.report.run.write_report", fail)
    report_after(finished)
    assert f"the report was not written: RuntimeError: no ink. Try bissl report {finished}" in caplog.text


@pytest.mark.slow
@needs_browser
def test_a_browser_shows_the_page_on_a_phone_and_on_a_desk(whole):
    with browser() as page:
        for width in (390, 1440):
            page.open(whole[0], width)
            assert page.value("document.documentElement.scrollWidth") <= width
            sizes = page.value("[...document.images].map((one) => [one.naturalWidth, one.clientWidth])")
            assert len(sizes) >= 12 and all(natural > 300 and 100 < shown <= width for natural, shown in sizes)
            fold = "document.querySelector('details')"
            height = f"{fold}.getBoundingClientRect().height"
            closed = page.value(height)
            page.value(f"{fold}.querySelector('summary').click()")
            assert page.value(f"{fold}.open") is True and page.value(height) > closed + 50
        assert page.complaints == []
        assert {url.partition(":")[0] for url in page.requests} <= {"file", "data"}
        assert {url for url in page.requests if url.startswith("file:")} == {whole[0].absolute().as_uri()}
