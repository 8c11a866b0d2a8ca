"""A disk that is full, on a small file system of its own, or that fails, by errors where the system is called."""

import errno
import json
import logging
import os
import shutil
import subprocess
import sys

import pytest
import torch

from bissl_zoo import files as disk
from bissl_zoo.engine import hooks
from bissl_zoo.engine.hooks import MetricsWriter, PeriodicCheckpoint
from bissl_zoo.engine.trainer import Hook, Trainer
from bissl_zoo.errors import CheckpointError
from bissl_zoo.files import DiskError
from bissl_zoo.progress.writers import JsonWriter
from bissl_zoo.runs.checkpoint import Checkpointer, load_checkpoint

logger = logging.getLogger("bissl_zoo.tests")
CPU = torch.device("cpu")
MIB = 1 << 20


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m,nr_inodes=64", "tmpfs", folder]
    mounted = subprocess.run(mount, capture_output=True, text=True) if shutil.which("mount") else None
    if mounted is None or mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip() if mounted else 'no mount'}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture
def pauses(monkeypatch):
    """The pauses that were made, without their taking time."""
    made = []
    monkeypatch.setattr(disk.time, "sleep", made.append)
    return made


@pytest.fixture
def failing_fsync(monkeypatch):
    """`failing_fsync("state", errno.EIO)` lets forcing a file to disk fail, of files whose path holds the text."""

    def fail(text, number):
        def fsync(handle):
            if text in os.readlink(f"/proc/self/fd/{handle}"):
                raise OSError(number, os.strerror(number))
            real(handle)

        monkeypatch.setattr(os, "fsync", fsync)
        return lambda: monkeypatch.setattr(os, "fsync", real)

    real = os.fsync
    return fail


class Growing(Trainer):
    """A trainer whose state is one tensor of 1 MiB that tells its step."""

    def run_step(self):
        return {"total_loss": 1.0 / (self.step + 1)}

    def levels(self):
        return {}

    def state_dict(self):
        return {"step": self.step, "weight": torch.full((MIB // 4,), float(self.step))}


class At(Hook):
    """Does something after the steps that are named."""

    def __init__(self, **actions):
        self.actions = {int(name.removeprefix("step")): action for name, action in actions.items()}

    def after_step(self):
        self.actions.get(self.trainer.step, lambda: None)()


class Filler:
    """A file of somebody else, which takes all the room there is but a little."""

    def __init__(self, folder, spare=0):
        self.path, self.spare = folder / "filler", spare

    def fill(self):
        free = shutil.disk_usage(self.path.parent).free
        self.path.write_bytes(bytes(max(0, free - self.spare)))

    def clear(self):
        self.path.unlink()


def checkpoints(folder, period=1, keep=1):
    return PeriodicCheckpoint(Checkpointer(folder, keep), period, "resnet18", CPU)


def warnings(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]


@pytest.mark.slow
def test_a_checkpoint_on_the_way_that_finds_no_room_is_a_warning_and_the_next_is_written(small_disk, pauses, capsys):
    folder, filler = small_disk / "checkpoints", Filler(small_disk, spare=MIB // 2)
    seen = []
    look = At(step3=lambda: seen.append([path.name for path in (folder / "stage").iterdir()]))
    hook = checkpoints(folder, keep=2)
    Growing("stage", 5).train([At(step2=filler.fill, step4=filler.clear), hook, look])
    assert seen == [["step_000001"]]  # complete, and no draft beside it
    assert [load_checkpoint(path)[0].step for path in sorted((folder / "stage").iterdir())] == [4, 5]
    assert warnings(capsys) == [
        f"warning: checkpoint of stage at step {step} could not be written to {folder / 'stage'}: No space left on "
        "device; it needs about 1.0 MiB, 512 KiB are free. The run continues; the last one is step 1."
        for step in (2, 3)
    ]
    assert pauses == [*hooks.PAUSES] * 2


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_the_earlier_checkpoint_stays_whichever_way_the_disk_fails(tmp_path, failing_fsync, pauses, capsys, number):
    fail = {"step2": lambda: failing_fsync("step_000002", number)}
    Growing("stage", 3).train([At(**fail), checkpoints(tmp_path, keep=1)])
    assert os.strerror(number) in warnings(capsys)[0]
    assert [path.name for path in (tmp_path / "stage").iterdir()] == ["step_000003"]
    with pytest.raises(CheckpointError, match=f"{os.strerror(number)}.*--resume continues from step 3 of stage"):
        checkpoints(tmp_path).checkpointer.save("stage", 2, 3, "resnet18", {"weight": torch.zeros(3)})
    assert load_checkpoint(tmp_path / "stage" / "step_000003")[1]["weight"][0] == 3


@pytest.mark.slow
@pytest.mark.parametrize("stop_at", [None, 3])
def test_the_last_checkpoint_and_one_on_stopping_end_the_run_where_the_disk_stays_full(
    small_disk, pauses, capsys, stop_at
):
    folder, trainer = small_disk / "checkpoints", Growing("stage", 9 if stop_at else 3)
    with pytest.raises(DiskError) as raised:
        trainer.train(
            [At(step3=Filler(small_disk).fill), checkpoints(folder, period=2)], lambda: trainer.step == stop_at
        )
    assert f"Could not write checkpoint {folder}/stage/step_000003: No space left on device" in str(raised.value)
    assert "needs about 1.0 MiB, 0 bytes are free" in str(raised.value) and "step 2 of stage" in str(raised.value)
    assert [path.name for path in (folder / "stage").iterdir()] == ["step_000002"]
    assert pauses == list(hooks.LAST_PAUSES) and len(warnings(capsys)) == len(pauses)


def test_an_error_that_waiting_cannot_fix_ends_the_run_at_once(tmp_path, pauses):
    (tmp_path / "stage").write_text("")
    with pytest.raises(CheckpointError, match="--resume continues from the beginning of stage") as raised:
        Growing("stage", 3).train([checkpoints(tmp_path)])
    assert not isinstance(raised.value, DiskError) and pauses == []


@pytest.mark.slow
def test_metrics_that_find_no_room_wait_and_are_written_in_order(small_disk, capsys):
    filler, trainer = Filler(small_disk), Growing("stage", 200)
    metrics = {"total_loss": 1.0, **{f"figure{number}": 0.5 for number in range(40)}}  # much in a page of either file
    trainer.run_step = lambda: metrics
    trainer.train(
        [
            At(step20=filler.fill, step150=filler.clear),
            MetricsWriter(small_disk, 10, [JsonWriter(small_disk, 10)]),
            HalfLines(small_disk),
        ]
    )
    records = [json.loads(line) for line in (small_disk / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "event" not in record] == list(range(10, 201, 10))
    lines = warnings(capsys)
    assert 8 <= len(lines) <= 13  # periods, of the 130 steps without room but for what the file's last page had left
    assert all("metrics.jsonl" in line for line in lines) and "No space left on device" in lines[-1]


class HalfLines(Hook):
    """Finds after every step that the metrics end with a line."""

    def __init__(self, folder):
        self.path = folder / "metrics.jsonl"

    def after_step(self):
        assert not self.path.exists() or self.path.read_bytes()[-1:] in (b"", b"\n")


def test_output_to_a_full_disk_does_not_end_the_run_but_a_closed_pipe_does(monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        logger.info("a line")
        monkeypatch.undo()
        with pytest.raises(OSError, match="No space left"):
            full.close()
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        with pytest.raises(BrokenPipeError):
            logger.info("a line")
        monkeypatch.undo()
        with pytest.raises(BrokenPipeError):
            pipe.close()


@pytest.mark.slow
def test_a_zoo_that_refuses_leaves_a_complete_run_that_a_resume_publishes(train_net, tiny, run_copy, small_disk):
    (run_copy / "zoo_entry.json").unlink()
    Filler(small_disk, spare=64 * 1024).fill()
    settings = [*tiny(train__publish__zoo=small_disk / "zoo"), f"train.output_dir={run_copy}"]
    message = train_net("--resume", *settings).message()
    assert "No space left" in message and str(small_disk / "zoo") in message
    assert f"The training is complete, and its results are in {run_copy / 'results.json'}" in message
    assert message.endswith("--resume publishes again.\n")
    (small_disk / "filler").unlink()
    outcome = train_net("--resume", *settings)
    assert outcome.status == 0 and "published" in outcome.out, outcome
