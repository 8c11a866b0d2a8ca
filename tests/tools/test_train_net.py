"""The command line of train_net.py: what it refuses, with which message, and what it prints."""

import re
import shutil
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from bissl_zoo.cli.train import next_steps

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[2]
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
CLASSIFICATION = "{_target_: bissl_zoo.registry.build_task, name: classification, image_size: 32}"


@pytest.fixture
def refused(train_net, tiny, tmp_path):
    """The message with which a run is refused before it has made its directory."""

    def call(*arguments, overrides=None, **options):
        folder = tmp_path / "refused"
        settings = tiny() if overrides is None else overrides
        message = train_net(*settings, f"train.output_dir={folder}", *arguments, **options).message()
        assert not folder.exists()
        return message

    return call


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("backbone.name=resnet81", "resnet18"),
        ("dataloader.train.dataset.name=digit_scene", "digit_scenes"),
        ("+solver.dampng=1.0", "damping"),
        ("+optimizer.finetune.weight_decy=0.1", "weight_decay"),
        ("+lr_multiplier.upper.warmup_step=1", "warmup_steps"),
        ("+dataloader.train.num_worker=1", "num_workers"),
    ],
)
def test_an_unknown_name_or_argument_of_any_part_is_refused_with_the_nearest(refused, override, meant):
    assert f"Did you mean '{meant}'?" in refused(override)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("bilevel.shared_stage=c7", "c7"),
        ("train.device=tpu9", "tpu9"),
        ("bilevel.head_warmup.steps=null", "bilevel.head_warmup: give either steps or epochs"),
        ("dataloader.train.dataset.split=unlabeled", "dataloader.train reads an unlabelled"),
        ("train.init=runs/nowhere", "train.init='runs/nowhere' is neither a file nor a run directory"),
        ("~optimizer.finetune", "finetune"),
        ("solver.iteration=3", "Nearest: solver.iterations"),
        (f"task={CLASSIFICATION}", "task 'classification' does not fit the data set 'digit_scenes'"),
        pytest.param("train.device=cuda", "train.device='cuda'", marks=NO_GPU),
    ],
)
def test_a_run_that_cannot_work_is_refused_before_its_directory_is_made(refused, override, message):
    assert message in refused(override)


def test_a_missing_voc_set_names_folder_variable_and_command(refused, tmp_path):
    options = dict(config="bissl/voc_det.py", overrides=["train.stages=[finetune]"], datasets=tmp_path / "none")
    message = refused(**options)
    assert str(tmp_path / "none" / "VOCdevkit" / "VOC2007") in message
    assert "BISSL_ZOO_DATASETS" in message and "bissl data voc_detection" in message


def test_a_run_of_another_architecture_is_refused_as_start(refused, finished):
    message = refused("backbone.name=resnet10t", f"train.init={finished}", "train.stages=[bissl,finetune]")
    assert "'test_resnet'" in message and "'resnet10t'" in message


def test_a_pickle_that_calls_itself_safetensors_is_refused_as_start(refused, tmp_path):
    torch.save(timm.create_model("test_resnet", num_classes=0).state_dict(), tmp_path / "pickle.safetensors")
    message = refused(f"train.init={tmp_path / 'pickle.safetensors'}")
    assert "cannot be read" in message and "pickle.safetensors" in message


def test_a_damaged_checkpoint_is_named_and_set_aside_and_the_one_before_it_is_resumed(train_net, tiny, run_copy):
    newest = run_copy / "checkpoints" / "bissl" / "step_000002"
    state = bytearray((newest / "state.pt").read_bytes())
    state[len(state) // 2] ^= 1
    (newest / "state.pt").write_bytes(state)
    (run_copy / "results.json").unlink()  # a finished run is left alone
    outcome = train_net("--resume", *tiny(), f"train.output_dir={run_copy}")
    assert outcome.status == 0, outcome.err
    assert f"warning: {newest / 'state.pt'} is damaged: sha256" in outcome.out
    assert f"resuming: bissl at step 1 of 2, from {newest.with_name('step_000001')}, verified" in outcome.out
    aside = [path for path in newest.parent.iterdir() if path.name.startswith("damaged_step_000002")]
    assert len(aside) == 1 and (aside[0] / "state.pt").read_bytes() == state


def test_the_last_stage_of_a_finished_run_may_be_made_longer(train_net, tiny, run_copy):
    outcome = train_net("--resume", *tiny(finetune__steps=3), f"train.output_dir={run_copy}")
    assert "finetune_pretrained had 2 steps when finetune started" in outcome.message()
    shutil.rmtree(run_copy / "checkpoints" / "finetune")
    outcome = train_net("--resume", *tiny(finetune__steps=3), f"train.output_dir={run_copy}")
    assert outcome.status == 0, outcome.err
    assert "resuming: finetune_pretrained at step 2 of 3" in outcome.out and "[finetune 3/3]" in outcome.out
    shorter = train_net("--resume", *tiny(), f"train.output_dir={run_copy}")
    assert "finetune.steps  3      2" in shorter.message()


def test_eval_only_needs_a_fine_tuned_model(train_net, tiny, tmp_path):
    run = tmp_path / "pretrained"
    assert train_net(*tiny(), f"train.output_dir={run}", "train.stages=[pretrain]").status == 0
    save_file(timm.create_model("test_resnet", num_classes=0).state_dict(), tmp_path / "weights.safetensors")
    for init in (run, tmp_path / "weights.safetensors", "null"):
        message = train_net("--eval-only", *tiny(), f"train.init={init}").message()
        assert "finetune" in message


def test_the_help_names_every_exit_status_that_the_documentation_has(tool, capsys):
    with pytest.raises(SystemExit):
        tool.parse_args(["--help"])
    statuses_in_help = capsys.readouterr().out.partition("exit status:")[2]
    rows = re.findall(r"^\|.*\| ([\d, ]+) \|$", (REPOSITORY / "docs" / "runs.md").read_text(), re.MULTILINE)
    statuses = {status for row in rows for status in row.split(", ")}
    assert {"0", "1", "2", "130", "143", "138", "137", "141"} <= statuses == set(re.findall(r"\d+", statuses_in_help))


def test_a_quiet_run_prints_the_table_alone_and_logs_the_rest(train_net, tiny, tmp_path):
    run = tmp_path / "run"
    outcome = train_net("--quiet", *tiny(), "train.stages=[finetune]", f"train.output_dir={run}")
    lines = [line for line in outcome.out.split("\n") if not line.startswith("warning: ")]
    assert outcome.status == 0 and [line[:10] for line in lines] == ["", "fine-tuned", "----------", "init      ", ""]
    assert "[finetune 2/2] total_loss" in (run / "log.txt").read_text()


def test_a_verbose_run_has_a_line_of_every_step(train_net, tiny, tmp_path):
    settings = tiny(train__log_period=100, finetune__steps=4)
    outcome = train_net("--verbose", *settings, "train.stages=[finetune]", f"train.output_dir={tmp_path / 'run'}")
    assert re.findall(r"\[finetune (\d)/4\] total_loss", outcome.out) == ["1", "2", "3", "4"]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len([line for line in lines if "event" not in line]) == 1  # the period is that of the records


def test_the_end_of_a_run_gives_the_change_by_bissl_and_the_next_commands(tmp_path):
    results = {"pretrained": {"AP": 0.25, "AP50": 0.5}, "bissl": {"AP": 0.27, "AP50": 0.49}}
    text = next_steps(results, str(tmp_path), "photos.py")
    assert text.startswith("AP 0.2700 with BiSSL, 0.2500 by fine-tuning alone (+0.0200)") and "look at" not in text
    assert f"bissl predict {tmp_path} photo.jpg" in text and "bissl compare --config-file photos.py" in text
    (tmp_path / "report.html").touch()
    alone = next_steps({"init": {"AP": 0.2}}, str(tmp_path), "photos.py")
    assert alone.startswith("AP 0.2, fine-tuned from init.\n\nnext") and f"open {tmp_path}/report.html" in alone
