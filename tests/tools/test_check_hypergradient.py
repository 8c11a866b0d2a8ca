"""The command line of tools/check_hypergradient.py."""

import contextlib
import io
import json
import math

import pytest
from command_line import load_tool

from bissl_zoo.hypergradient import CurvatureOperator
from bissl_zoo.registry import SOLVERS

pytestmark = pytest.mark.slow
QUICK = ("--max-products", "3", "--lanczos-steps", "4", "--warmup-steps", "1")


@pytest.fixture(scope="module")
def check(scenes):
    """Call the command line: `check("a.b=c", output=folder)` -> (status, out, err)."""
    tool = load_tool("check_hypergradient")

    def call(*arguments, output, config="quickstart/digit_scenes_det.py"):
        out, err = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            patch.setenv("BISSL_ZOO_DATASETS", str(scenes))
            command = ["--config-file", str(config), "--output-dir", str(output), *map(str, arguments)]
            status = tool.cli(command)
        return status, out.getvalue(), err.getvalue()

    return call


@pytest.fixture(scope="module")
def outcome(check, tiny, finished, tmp_path_factory):
    """One check on the finished tiny run: its folder, result and output."""
    folder = tmp_path_factory.mktemp("check") / "new"
    settings = tiny(solver__damping=2.0, solver__tolerance=0.01)
    status, out, err = check(*QUICK, "--run", finished, *settings, output=folder)
    assert status == 0, err
    return folder, json.loads((folder / "check.json").read_text()), out


def test_the_results_are_complete_and_finite(outcome):
    _, result, _ = outcome
    assert result["passed"] and all(entry["passed"] for entry in result["reduced"]["checks"])
    real = result["real"]
    assert real["symmetry"]["passed"] and real["lambda"] == 0.1 and real["damping"]["configured"] == 2.0
    values = real["spectrum"]["values"]
    assert values == sorted(values) and all(map(math.isfinite, values + real["spectrum"]["bounds"]))
    assert {row["solver"] for row in real["solvers"]} | set(real["skipped"]) == set(SOLVERS.list())
    for row in real["solvers"]:
        assert [p["budget"] for p in row["points"]] in ([1, 2, 3], [None])
        assert all(p["residual"] >= 0 for p in row["points"])
        assert -1 <= row["cosine_to_v"] <= 1.0001 and -1 <= row["cosine_to_best"] <= 1.0001
    identity = next(row for row in real["solvers"] if row["solver"] == "identity")
    assert identity["cosine_to_v"] == pytest.approx(1.0, abs=1e-6) and identity["points"][0]["products"] == 0
    assert real["definiteness"][0]["damping"] == pytest.approx(2.0)
    assert {entry["state"] for entry in real["definiteness"]} <= {"definite", "indefinite", "undecided"}


def test_the_output_agrees_with_the_file(outcome):
    folder, result, out = outcome
    assert result["advice"]["sentence"] in out and str(folder / "check.json") in out
    assert "pass  Hessian-vector product against finite differences" in out
    assert "ReLU -> Softplus" in out and "with its pretext head" in out
    assert "min to go" in out


def test_a_damping_that_is_advised_converges(check, tiny, finished, tmp_path):
    settings = [*QUICK, "--run", finished, *tiny(solver__damping=0.001, solver__tolerance=0.01, solver__iterations=2)]
    status, _, err = check(*settings, output=tmp_path / "before")
    assert status == 0, err
    advice = json.loads((tmp_path / "before" / "check.json").read_text())["advice"]
    assert not advice["converges"]
    option = next(option for option in advice["options"] if option["solver"] == "minres")
    changed = [f"solver.damping={option['damping']}", f"solver.iterations={option['budget']}"]
    status, out, err = check(*settings, *changed, output=tmp_path / "after")
    assert status == 0, err
    assert json.loads((tmp_path / "after" / "check.json").read_text())["advice"]["converges"]


@pytest.mark.parametrize(("curvature", "matrix"), [("gauss_newton", "Gauss-Newton matrix"), ("hessian", "Hessian")])
def test_both_curvatures_are_checked_also_with_random_weights(check, tiny, tmp_path, curvature, matrix):
    changed = dict(bilevel__curvature=curvature, solver__damping="auto")
    status, out, err = check(*QUICK, *tiny(**changed), output=tmp_path)
    assert status == 0, err
    assert "weights: random" in out and "--run RUN_DIR" in out
    result = json.loads((tmp_path / "check.json").read_text())
    assert result["real"]["curvature"] == curvature and f"   {matrix} from " in out
    assert ("pass  Gauss-Newton product" in out) == (curvature == "gauss_newton")
    if curvature == "gauss_newton":
        assert min(result["real"]["spectrum"]["values"]) > -1e-3 * max(result["real"]["spectrum"]["values"])


def test_a_wrong_product_ends_with_status_1_and_its_name(check, tiny, tmp_path, monkeypatch):
    right = CurvatureOperator.hessian_product
    monkeypatch.setattr(CurvatureOperator, "hessian_product", lambda self, u: 0.5 * right(self, u))
    status, out, err = check(*QUICK, *tiny(), output=tmp_path)
    assert status == 1
    assert err.startswith("error: The hypergradient is wrong.") and len(err.splitlines()) == 1
    assert "Hessian-vector product against finite differences" in err and "0.5 times the expected value" in err
    assert "FAIL  Hessian-vector product" in out
    assert json.loads((tmp_path / "check.json").read_text())["passed"] is False


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["solver.name=minrs"], "Did you mean 'minres'?"),
        (["--max-products", "0"], "--max-products is 0"),
        (["--run", "runs/nowhere"], "runs/nowhere"),
    ],
)
def test_invalid_input_is_refused_before_the_check(check, tiny, tmp_path, arguments, message):
    status, out, err = check(*tiny(), *arguments, output=tmp_path / "refused")
    assert status == 1 and err.startswith("error: ") and message in err and "Traceback" not in err
    assert "reduced problem" not in out and not (tmp_path / "refused").exists()


def test_a_file_in_the_place_of_the_output_directory_is_refused(check, tiny, tmp_path):
    (tmp_path / "file").write_text("mine")
    status, out, err = check(*tiny(), output=tmp_path / "file")
    assert status == 1 and f"--output-dir {tmp_path / 'file'}" in err and "reduced problem" not in out
