"""The command line as processes of its own: a full disk, a kill, two processes at once."""

import json
import resource
import signal
import time

import pytest

from bissl_zoo.config import LazyConfig

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def test_a_full_disk_leaves_the_earlier_checkpoints_as_they_were(train_net_process, tiny, finished, tmp_path):
    run = tmp_path / "run"
    pretrain, bissl = (
        (finished / f"checkpoints/{stage}/step_000002/state.safetensors").stat().st_size
        for stage in ("pretrain", "bissl")
    )
    limit = (pretrain + bissl) // 2
    assert pretrain < limit < bissl
    outcome = train_net_process(
        *tiny(),
        f"train.output_dir={run}",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    message = outcome.message()
    assert "bissl" in message and "Could not write checkpoint" in message
    kept = sorted(path.relative_to(run / "checkpoints").as_posix() for path in run.glob("checkpoints/*/*"))
    assert [path for path in kept if path.startswith("pretrain")] == ["pretrain/step_000001", "pretrain/step_000002"]
    assert not [path for path in kept if path.startswith("bissl")]  # neither a checkpoint nor the draft of one


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
    assert "which is gone" in outcome.out  # the lock of the killed process
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
    figures = dict(zip(rows[0][2:], map(float, rows[-1][1:]), strict=True))
    # printed with four digits; what a single process finds in all eight images is what two found together
    assert figures == pytest.approx({name: measured[name] for name in figures}, abs=5.1e-5)


def test_torchrun_starts_it_and_one_process_speaks(train_net_process, tiny):
    outcome = train_net_process("--dry-run", *tiny(), launcher=TORCHRUN)
    assert outcome.status == 0, outcome.err
    assert outcome.out.count("finetune_pretrained (baseline)") == 1


def test_a_batch_that_does_not_divide_among_processes_is_one_message(train_net_process, tiny, tmp_path):
    run = tmp_path / "run"
    outcome = train_net_process("--num-gpus", "2", *tiny(dataloader__train__batch_size=3), f"train.output_dir={run}")
    assert outcome.message().count("error") == 1
    assert "dataloader.train.batch_size=3" in outcome.err
    assert not run.exists()


def test_a_damaged_image_of_one_process_is_one_message(train_net_process, tiny, scenes_copy, tmp_path):
    root, year = scenes_copy
    for image in year.glob("JPEGImages/test_00000[1357].jpg"):  # the second process's part of the test set
        image.write_bytes(image.read_bytes()[:200])
    settings = [*tiny(), "train.stages=[finetune]", "dataloader.test.num_workers=1"]
    outcome = train_net_process("--num-gpus", "2", *settings, f"train.output_dir={tmp_path / 'run'}", datasets=root)
    assert outcome.message().count("error") == 1
    assert "error on rank 1: Image" in outcome.err and "does not decode" in outcome.err
