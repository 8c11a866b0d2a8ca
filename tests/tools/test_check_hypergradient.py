"""The command line of tools/check_hypergradient.py."""

import contextlib
import io
import json
import math
import shlex

import pytest
from command_line import load_tool

from bissl_zoo.hypergradient import CurvatureOperator
from bissl_zoo.registry import SOLVERS

pytestmark = pytest.mark.slow
QUICK = ("--max-products", "3", "--warmup-steps", "1")


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
    folder, result, _ = outcome
    assert result["passed"] and all(entry["passed"] for entry in result["reduced"]["checks"])
    real = result["real"]
    assert real["lambda"] == 0.1 and list(real["matrices"]) == ["gauss_newton", "hessian"]
    for matrix in real["matrices"].values():
        values = matrix["spectrum"]["values"]
        assert matrix["symmetry"]["passed"] and values == sorted(values)
        assert all(map(math.isfinite, values + matrix["spectrum"]["bounds"]))
    semidefinite = real["matrices"]["gauss_newton"]["spectrum"]["values"]
    assert semidefinite[0] > -1e-3 * semidefinite[-1]
    assert {row["solver"] for row in real["solvers"]} | set(real["skipped"]) == set(SOLVERS.list())
    for row in real["solvers"]:
        assert row["residual"] >= 0 and -1 <= row["cos_xv"] <= 1.0001 and row["time"] >= 1.0
        assert row["damping"] == pytest.approx(2.0)
    identity = [row for row in real["solvers"] if row["solver"] == "identity"]
    assert len(identity) == 1 and identity[0]["cos_xv"] == pytest.approx(1.0, abs=1e-6)


def test_the_output_agrees_with_the_file(outcome):
    folder, result, out = outcome
    assert result["advice"]["sentence"] in out and str(folder / "check.json") in out
    assert "pass  Hessian-vector product against finite differences" in out
    assert "ReLU -> Softplus" in out and "with its pretext head" in out
    assert shlex.join(result["advice"]["overrides"]) in out


def test_the_advice_is_accepted_and_then_the_config_is_as_advised(check, tiny, finished, tmp_path):
    settings = [*QUICK, "--run", finished, *tiny(solver__damping=0.001, solver__tolerance=0.001, solver__iterations=1)]
    status, _, err = check(*settings, output=tmp_path / "before")
    assert status == 0, err
    overrides = json.loads((tmp_path / "before" / "check.json").read_text())["advice"]["overrides"]
    assert overrides
    status, out, err = check(*settings, *overrides, output=tmp_path / "after")
    assert status == 0, err


@pytest.mark.parametrize("curvature", ["gauss_newton", "hessian"])
def test_automatic_damping_is_checked_also_with_random_weights(check, tiny, tmp_path, curvature):
    changed = dict(bilevel__curvature=curvature, solver__damping="auto")
    status, out, err = check(*QUICK, *tiny(**changed), output=tmp_path)
    assert status == 0, err
    assert "weights: random" in out and "--run RUN_DIR" in out
    result = json.loads((tmp_path / "check.json").read_text())
    assert result["real"]["curvature"] == curvature == result["real"]["solvers"][0]["curvature"]
    assert ("pass  Gauss-Newton product" in out) == (curvature == "gauss_newton")
    assert all(row["norm_ratio"] <= 1.01 for row in result["real"]["solvers"] if row["solver"] == "minres")


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
