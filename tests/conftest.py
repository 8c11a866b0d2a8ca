"""Shared fixtures: the command line, a tiny version of the quickstart, and the tier of each test.

A test that uses a fixture of `SLOW_FIXTURES` belongs to the slow tier without a marker. A unit test that starts a
process fails.
"""

import contextlib
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from command_line import load_tool

from bissl_zoo.config import LazyConfig, load_config
from bissl_zoo.data.datasets.digit_scenes import write_digit_scenes
from bissl_zoo.progress.display import console

REPOSITORY = Path(__file__).resolve().parents[1]
QUICKSTART = "quickstart/digit_scenes_det.py"
#: fixtures that train a run or start a process
SLOW_FIXTURES = {"finished", "process", "train_net_process"}
#: audit events of a process that starts
STARTS = {"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn"}
started: list[str] = []
SCENES = {"image_size": 64, "unlabeled": 24, "train": 16, "val": 1, "test": 8}


@pytest.hookimpl(tryfirst=True)  # before pytest deselects by marker
def pytest_collection_modifyitems(items):
    """Mark tests that use a slow fixture as slow; skip GPU tests on a machine without a GPU."""
    for item in items:
        if SLOW_FIXTURES.intersection(item.fixturenames):
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@sys.addaudithook
def _record_start(event, arguments):
    # libraries that look at the machine start small programs, such as uname, at their first use
    if event in STARTS and (event != "subprocess.Popen" or "python" in str(arguments[1])):
        started.append(event)


@pytest.fixture(autouse=True)
def unit_tests_start_no_process(request):
    """Fail a unit test during which, or in whose fixtures, a process was started."""
    yield
    events, started[:] = set(started), []
    if request.node.get_closest_marker("slow") is None and request.node.get_closest_marker("soak") is None:
        assert not events, f"a unit test started a process ({', '.join(events)}): add @pytest.mark.slow"


class Outcome(NamedTuple):
    """The exit status and the output of a command."""

    status: int
    out: str
    err: str

    def message(self) -> str:
        """Return the error message of a command that failed without a traceback."""
        assert self.status == 1, self
        assert self.err.startswith("error") and "Traceback" not in self.err, self.err
        return self.err


# Autograd starts a thread for every device that is known at the first backward pass, and forks are impossible then.
# torch.export makes devices known that do not exist, so the first pass comes before it.
torch.ones(1, requires_grad=True).sum().backward()

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # one xdist worker per core
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # also for the processes that tests start


@pytest.fixture(scope="session", autouse=True)
def zoo_cache(tmp_path_factory):
    """Keep downloads of the tests out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BISSL_ZOO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def printed_log():
    """Log records of the package are printed, as the tools do, so that tests read them in the output."""
    with console():
        yield


@pytest.fixture(scope="session")
def tool():
    """Return the command `bissl train`."""
    return load_tool("train_net")


@pytest.fixture(scope="session")
def train_net(tool, scenes):
    """Call the command line in this process: `train_net("--dry-run", "a.b=c", config=..., datasets=...)` -> Outcome."""

    def call(*arguments, config=QUICKSTART, datasets=scenes):
        out, err = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            patch.setenv("BISSL_ZOO_DATASETS", str(datasets))
            status = tool.cli(["--config-file", str(config), *map(str, arguments)])
        return Outcome(status, out.getvalue(), err.getvalue())

    return call


@pytest.fixture(scope="session")
def process(scenes):
    """Start a Python program: `process("tools/train_net.py", ...)` -> Popen."""

    def start(*command, datasets=scenes, **options):
        environment = {**os.environ, "BISSL_ZOO_DATASETS": str(datasets), "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
        return subprocess.Popen(
            [sys.executable, *map(str, command)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
            env=environment,
            **options,
        )

    return start


@pytest.fixture(scope="session")
def train_net_process(process):
    """Call the command line in a new process: `train_net_process("--resume", "a.b=c")` -> Outcome."""

    def call(*arguments, config=QUICKSTART, launcher=(), **options):
        command = [*launcher, REPOSITORY / "tools" / "train_net.py", "--config-file", config, *arguments]
        with process(*command, **options) as running:
            out, err = running.communicate(timeout=300)
        return Outcome(running.returncode, out, err)

    return call


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Return overrides that shorten the quickstart to seconds and publish to a temporary zoo."""
    zoo = tmp_path_factory.mktemp("zoo")

    def overrides(**changed):
        values = {
            "backbone.name": "test_resnet",
            "pretext.augmentation.size": 32,
            "task.min_size": 64,
            "task.max_size": 64,
            "task.box_head": 16,
            "train.log_period": 1,
            "train.report": False,  # takes longer than the run
            "train.device": "cpu",
            "train.publish.name": "tiny.simclr_bissl_digit_scenes",
            "train.publish.zoo": zoo,
            "train.checkpoint.period": 1,
            "pretrain.steps": 2,
            "optimizer.pretrain": "{_target_: torch.optim.SGD, lr: 0.1, momentum: 0.9}",  # small optimizer state
            "bilevel.head_warmup.steps": 2,
            "bilevel.alternations": 2,
            "bilevel.lower_steps": 2,
            "bilevel.upper_steps": 1,
            "finetune.steps": 2,
            "solver.iterations": 2,
        }
        for role, batch in {"pretext": 8, "train": 4, "test": 4}.items():
            values[f"dataloader.{role}.batch_size"] = batch
            values[f"dataloader.{role}.num_workers"] = 0
            values |= {f"+dataloader.{role}.dataset.{key}": value for key, value in SCENES.items()}
        values |= {key.replace("__", "."): value for key, value in changed.items()}
        return [f"{key}={value}" for key, value in values.items()]

    return overrides


@pytest.fixture(scope="session")
def tiny_config(tiny):
    """Build the config with the overrides of `tiny`: `tiny_config(bilevel__alternations=3)`."""

    base = load_config(QUICKSTART)

    def build(**changed):
        return LazyConfig.apply_overrides(base, tiny(**changed))

    return build


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """Return a datasets root with the digit scenes that `tiny` reads."""
    root = tmp_path_factory.mktemp("datasets")
    counts = {key: value for key, value in SCENES.items() if key != "image_size"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BISSL_ZOO_DATASETS", str(root))
        write_digit_scenes(SCENES["image_size"], 0, counts)
    return root


@pytest.fixture
def at_scenes(scenes, monkeypatch):
    """Set `BISSL_ZOO_DATASETS` to `scenes` for this test."""
    monkeypatch.setenv("BISSL_ZOO_DATASETS", str(scenes))
    return scenes


@pytest.fixture
def scenes_copy(scenes, tmp_path):
    """Return a copy of `scenes` that a test may damage: the root and its folder VOC2007."""
    root = tmp_path / "datasets"
    shutil.copytree(scenes, root)
    return root, next(root.glob("*/VOCdevkit/VOC2007"))


@pytest.fixture(scope="session")
def finished(train_net, tiny, tmp_path_factory):
    """Return the directory of a finished tiny run; tests must not change it."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    outcome = train_net(*tiny(), f"train.output_dir={folder}")
    assert outcome.status == 0, outcome.err
    return folder


@pytest.fixture
def run_copy(finished, tmp_path):
    """Return a copy of the finished run that a test may damage."""
    return Path(shutil.copytree(finished, tmp_path / "run"))
