"""tools/report.py: the files it writes, and errors."""

import pytest
from command_line import load_tool


@pytest.fixture
def report(capsys):
    """Call the command line: status, standard output and standard error."""
    tool = load_tool("report")

    def call(*arguments):
        try:
            status = tool.cli([str(argument) for argument in arguments])
        except SystemExit as refused:
            status = refused.code
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return call


@pytest.mark.slow
def test_a_run_gets_its_report_in_its_directory_and_is_left_as_it_was(report, run_copy):
    (run_copy / "report.html").unlink(missing_ok=True)
    before = {path: path.stat().st_mtime_ns for path in run_copy.rglob("*") if path.is_file()}
    status, out, err = report(run_copy, "--files-only")
    assert (status, out, err) == (0, f"report {run_copy / 'report.html'}\n", "")
    page = (run_copy / "report.html").read_text()
    assert page.startswith("<!DOCTYPE html>") and "only the files of the run are read" in page
    after = {path: path.stat().st_mtime_ns for path in run_copy.rglob("*") if path.is_file()}
    assert after.pop(run_copy / "report.html") and after == before


@pytest.mark.slow
def test_reading_files_alone_imports_and_builds_nothing_of_the_config(report, run_copy):
    marker = run_copy.parent / "ran"
    module = run_copy.parent / "mine.py"
    module.write_text(f"open({str(marker)!r}, 'w').close()\n")
    text = (run_copy / "config.yaml").read_text()
    text = text.replace("imports: null", f"imports: ['{module}']")
    assert str(module) in text
    (run_copy / "config.yaml").write_text(text.replace("_target_: bissl_zoo.registry.build_task", "_target_: os.abort"))
    assert report(run_copy, "--files-only")[0] == 0
    assert not marker.exists()


@pytest.mark.slow
def test_the_number_of_images_is_an_option(report, finished, tmp_path, at_scenes):
    status, out, err = report(finished, "--images", 4, "--output", tmp_path / "report.html")
    assert (status, err) == (0, "") and "warning" not in out
    assert "among 4 of 8 test images" in (tmp_path / "report.html").read_text()


def test_other_folders_are_refused(report, tmp_path):
    status, _, err = report(tmp_path)
    assert status == 1 and err.startswith(f"error: There is no run in {tmp_path}")


@pytest.mark.parametrize(
    "arguments",
    [[], ["a", "b"], ["a", "--images", "0"], ["a", "--images", "5", "--files-only"]],
)
def test_arguments_that_do_not_go_together_are_refused(report, arguments):
    assert report(*arguments)[0] == 2
