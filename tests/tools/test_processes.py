"""The command line in other processes: a full disk, a kill, two processes at once."""

import json
import os
import resource
import signal
import time
from pathlib import Path

import pytest

from bissl_zoo.config import LazyConfig

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
#: runs the program named after it as if it were called, without the pauses between tries of a checkpoint
WITHOUT_PAUSES = """
import runpy, sys
from bissl_zoo.engine import hooks
hooks.PAUSES, hooks.LAST_PAUSES = (0.0,), (0.0,) * 3
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_full_disk_leaves_the_earlier_checkpoints_as_they_were(train_net_process, tiny, finished, tmp_path):
    run = tmp_path / "run"
    pretrain, bissl = (
        (finished / f"checkpoints/{stage}/step_000002/state.pt").stat().st_size for stage in ("pretrain", "bissl")
    )
    limit = (pretrain + bissl) // 2
    assert pretrain < limit < bissl
    outcome = train_net_process(
        *tiny(),
        f"train.output_dir={run}",
        launcher=("-c", WITHOUT_PAUSES),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    message = outcome.message()
    bissl = run / "checkpoints" / "bissl"
    assert message.startswith(f"error: Could not write checkpoint {bissl}/step_000002: File too large; it needs about ")
    assert "--resume continues from the beginning of bissl" in message and message.count("error") == 1
    on_the_way, *retries = [line for line in outcome.out.splitlines() if "checkpoint of bissl" in line]
    assert on_the_way.startswith(f"warning: checkpoint of bissl at step 1 could not be written to {bissl}: File too")
    assert on_the_way.endswith("The run continues; there is none of bissl yet.")
    assert len(retries) == 3 and all("at step 2" in line and "Trying again" in line for line in retries)
    left = sorted(path.relative_to(run / "checkpoints").as_posix() for path in run.glob("checkpoints/*/*"))
    assert [path for path in left if path.startswith("pretrain")] == ["pretrain/step_000001", "pretrain/step_000002"]
    assert not [path for path in left if path.startswith("bissl")]  # neither a checkpoint nor the draft of one


def test_a_killed_run_goes_on_from_its_newest_checkpoint(process, train_net, tiny, tmp_path):
    run = tmp_path / "run"
    settings = [*tiny(bilevel__alternations=200), f"train.output_dir={run}"]
    command = ["tools/train_net.py", "--config-file", "configs/quickstart/digit_scenes_det.py", *settings]
    with process(*command) as running:
        deadline = time.monotonic() + 120
        while not (run / "checkpoints" / "bissl" / "step_000002").exists():
            assert running.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        running.send_signal(signal.SIGKILL)
    # the rest of 200 alternations is more than a test needs: let the run have been one of a single alternation more
    newest = max(path for path in (run / "checkpoints" / "bissl").glob("step_*"))
    done = json.loads((newest / "manifest.json").read_text())["step"]
    config = run / "config.yaml"
    LazyConfig.save(LazyConfig.apply_overrides(LazyConfig.load(config), [f"bilevel.alternations={done + 1}"]), config)
    outcome = train_net(
        "--resume",
        *tiny(bilevel__alternations=done + 1, dataloader__train__num_workers=1, train__device="auto"),
        f"train.output_dir={run}",
    )
    assert outcome.status == 0, outcome.err
    assert f"resuming: bissl at step {done} of {done + 1}, from {newest}, verified" in outcome.out
    assert "no checkpoint of finetune to resume; it starts at step 0" in outcome.out
    assert "published" in outcome.out
    assert not list(run.glob("checkpoints/*/.*"))  # what the killed process was writing is gone


def test_two_processes_measure_the_whole_set_and_one_of_them_speaks(train_net_process, train_net, tiny, tmp_path):
    run = tmp_path / "run"
    outcome = train_net_process("--num-gpus", "2", *tiny(), f"train.output_dir={run}")
    assert outcome.status == 0, outcome.err
    assert outcome.out.count("stage 1 of 5: pretrain") == 1 and outcome.out.count("published") == 1
    assert "Traceback" not in outcome.err
    measured = json.loads((run / "results.json").read_text())["bissl"]
    alone = train_net("--eval-only", *tiny(), f"train.init={run}")
    assert alone.status == 0, alone.err
    rows = [line.split() for line in alone.out.splitlines() if line]
    metrics = dict(zip(rows[0][2:], map(float, rows[-1][1:]), strict=True))
    # printed with four digits; what a single process finds in all eight images is what two found together
    assert metrics == pytest.approx({name: measured[name] for name in metrics}, abs=5.1e-5)


def test_a_damaged_image_of_one_process_is_one_message(train_net_process, tiny, scenes_copy, tmp_path):
    root, year = scenes_copy
    for image in year.glob("JPEGImages/test_00000[1357].jpg"):  # the second process's part of the test set
        image.write_bytes(image.read_bytes()[:200])
    settings = [*tiny(), "train.stages=[finetune]", "dataloader.test.num_workers=1"]
    outcome = train_net_process("--num-gpus", "2", *settings, f"train.output_dir={tmp_path / 'run'}", datasets=root)
    assert outcome.message().count("error") == 1
    assert "error on rank 1: Image" in outcome.err and "does not decode" in outcome.err


def children_of(pid):
    """The processes that a launcher has started, in order, without its helpers (as multiprocessing's tracker)."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            command = Path(f"/proc/{child}/cmdline").read_bytes()
            if b"spawn_main" in command or b"train_net" in command:
                found.append(int(child))
    return sorted(found)


def wait_for_steps(run, count, process):
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or len((run / "metrics.jsonl").read_text().splitlines()) < count:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc to find the processes")
def test_a_lost_process_ends_the_others_with_one_message_and_a_request_to_the_launcher_reaches_all(
    process, tiny, tmp_path
):
    run = tmp_path / "run"
    settings = [*tiny(train__stages="[pretrain]", pretrain__steps=5000), f"train.output_dir={run}"]
    command = ["tools/train_net.py", "--config-file", "configs/quickstart/digit_scenes_det.py", "--num-gpus", "2"]
    with process(*command, *settings) as running:
        wait_for_steps(run, 3, running)
        os.kill(children_of(running.pid)[1], signal.SIGKILL)
        out, err = running.communicate(timeout=60)
    assert running.returncode == 128 + signal.SIGKILL
    errors = [line for line in err.splitlines() if "error" in line.lower()]
    assert errors == ["error: process 1 was killed (SIGKILL), and the others were stopped. Continue with --resume."]
    with process(*command, *settings, "--auto-resume") as running:
        wait_for_steps(run, 3 + len((run / "metrics.jsonl").read_text().splitlines()), running)
        running.send_signal(signal.SIGTERM)
        out, err = running.communicate(timeout=60)
    assert running.returncode == 128 + signal.SIGTERM
    assert "resuming: pretrain at step" in out and err.count("Interrupted at") == 1


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc to find the processes")
def test_torchrun_starts_a_run_again_that_lost_a_process_and_it_goes_on_by_itself(process, tiny, tmp_path):
    run = tmp_path / "run"
    settings = [*tiny(train__stages="[pretrain]", pretrain__steps=40), f"train.output_dir={run}"]
    command = [*TORCHRUN, "--max-restarts", "1", "tools/train_net.py", "--config-file"]
    with process(*command, "configs/quickstart/digit_scenes_det.py", *settings) as running:
        wait_for_steps(run, 3, running)
        os.kill(children_of(running.pid)[1], signal.SIGKILL)
        out, err = running.communicate(timeout=120)
    assert running.returncode == 0, err
    assert "resuming: pretrain at step" in out and "[pretrain 40/40]" in out
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "event" not in record] == list(range(1, 41))
