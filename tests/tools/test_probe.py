"""tools/probe.py: backbones from everywhere, measured on folders and on a config's data sets."""

import json

import numpy as np
import pytest
import timm
import torch
from command_line import load_tool
from digit_images import write_digit_folder
from safetensors.torch import save_file
from sklearn.neighbors import KNeighborsClassifier
from torchvision.transforms import v2

from bissl_zoo.backbones import merge_split_states
from bissl_zoo.config import LazyCall as L
from bissl_zoo.config import LazyConfig
from bissl_zoo.data import ImageFolder
from bissl_zoo.engine.features import load_frozen
from bissl_zoo.engine.runner import run
from bissl_zoo.errors import CheckpointError, ZooError
from bissl_zoo.registry import build_dataset
from bissl_zoo.runs.checkpoint import load_checkpoint
from bissl_zoo.weights.files import StoredBackbone, save_backbone
from bissl_zoo.zoo import publish_entry

PIXELS = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3)}
STATISTICS = ["--mean", 0.4, 0.5, 0.6, "--std", 0.2, 0.25, 0.3]


def random_resnet():
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=0).eval()


MODEL = random_resnet()


@pytest.fixture(scope="module")
def tool():
    """The module tools/probe.py."""
    return load_tool("probe")


@pytest.fixture
def probe(tool, capsys):
    """Call the command line: status, standard output and standard error."""

    def call(*arguments):
        status = tool.cli([*map(str, arguments), "--device", "cpu", "--num-workers", "0"])
        said = capsys.readouterr()
        return status, said.out, said.err

    return call


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return write_digit_folder(tmp_path_factory.mktemp("digits"))


@pytest.fixture
def folders(digits):
    return ["--train-folder", digits / "train", "--test-folder", digits / "test"]


@pytest.fixture
def plain(tmp_path):
    """Return a file with the weights of `MODEL` only."""
    save_file(MODEL.state_dict(), tmp_path / "plain.safetensors")
    return tmp_path / "plain.safetensors"


def embedded(folder, resize, size):
    crop = [v2.PILToTensor(), v2.Resize(resize, v2.InterpolationMode.BICUBIC), v2.CenterCrop(size)]
    transform = v2.Compose([*crop, v2.ToDtype(torch.float32, True), v2.Normalize(*PIXELS.values())])
    images, labels = zip(*((transform(image), label) for image, label in ImageFolder(str(folder))), strict=True)
    with torch.no_grad():
        return MODEL(torch.stack(images)).double().numpy(), labels


def test_a_plain_file_is_measured_as_scikit_learn_measures_its_features(probe, plain, folders, digits):
    arguments = [plain, "--architecture", "test_resnet", *folders, *STATISTICS, "--size", 28, "--k", 7, "--json"]
    status, out, err = probe(*arguments, "--linear", "--epochs", 20)
    assert status == 0, err
    metrics = json.loads(out)
    reference = KNeighborsClassifier(7, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07))
    reference.fit(*embedded(digits / "train", 32, 28))
    assert metrics["knn"]["top1"] == reference.score(*embedded(digits / "test", 32, 28))
    assert (metrics["train_images"], metrics["test_images"], metrics["classes"]) == (60, 40, 4)
    assert (metrics["architecture"], metrics["features"], metrics["size"]) == ("test_resnet", MODEL.num_features, 28)
    assert 0.5 < metrics["linear"]["top1"] <= 1  # four digits, a quarter each; chance is 0.25
    assert json.loads(probe(*arguments)[1]).keys() == metrics.keys() - {"linear"}


def test_an_entry_knows_its_size_and_statistics(probe, plain, folders, tmp_path, monkeypatch):
    monkeypatch.setenv("BISSL_ZOO", str(tmp_path / "zoo"))
    publish_entry(
        name="tiny",
        backbone_state=MODEL.state_dict(),
        architecture="test_resnet",
        pretrained_cfg={**PIXELS, "input_size": (3, 28, 28)},
        metadata={},
        train_config_text="",
        zoo=tmp_path / "zoo",
    )
    arguments = ["--architecture", "test_resnet", *folders, *STATISTICS, "--size", 28, "--json"]
    expected = json.loads(probe(plain, *arguments)[1])["knn"]
    for name in ("zoo:tiny", "tiny"):
        status, out, err = probe(name, *folders, "--json")
        assert status == 0, err
        assert json.loads(out)["knn"] == expected
    status, out, _ = probe("zoo:tiny", *folders)
    assert status == 0 and f"zoo:tiny: test_resnet, {MODEL.num_features} features of 28 pixels" in out
    assert "60 training and 40 test images of 4 classes" in out
    row = out.splitlines()[-1].split()
    assert row[:6] == ["knn", "k", "20,", "temperature", "0.07", f"{expected['top1']:.4f}"]


@pytest.mark.slow
def test_a_run_has_its_whole_backbone_and_pixel_statistics(tiny_config, at_scenes, tmp_path, probe, folders):
    cfg = tiny_config(train__output_dir=tmp_path / "run", train__stages="[pretrain]", train__publish__name="null")
    cfg.pretext.augmentation.mean = [0.4, 0.5, 0.6]
    run(cfg, "test")
    level = load_checkpoint(tmp_path / "run" / "checkpoints" / "pretrain" / "step_000002")[1]["levels"]["level"]
    tail = {key[len("tail.") :]: value for key, value in level["head"].items() if key.startswith("tail.")}
    frozen = load_frozen(str(tmp_path / "run"))
    whole = merge_split_states(level["backbone"], tail)
    state = frozen.model.state_dict()
    assert cfg.bilevel.shared_stage == "c3" and tail and state.keys() == whole.keys()
    assert all(torch.equal(state[key], whole[key]) for key in whole) and not frozen.model.training
    assert frozen.pixels["mean"] == [0.4, 0.5, 0.6] and frozen.pixels["input_size"] == [3, 32, 32]
    status, out, err = probe(tmp_path / "run", *folders)
    assert status == 0, err
    assert f"run (pretrain): test_resnet, {frozen.width(32)} features of 32 pixels" in out


@pytest.mark.slow
def test_a_run_of_fine_tuning_alone_has_no_tail_to_embed_with(tiny_config, at_scenes, tmp_path):
    run(tiny_config(train__output_dir=tmp_path / "run", train__stages="[finetune]"), "test")
    with pytest.raises(CheckpointError, match="holds the backbone up to c3 only"):
        load_frozen(str(tmp_path / "run"))
    with pytest.raises(ZooError, match="holds no model"):
        load_frozen(str(tmp_path))


@pytest.mark.slow
def test_the_data_sets_of_a_config_are_taken_with_overrides(tiny_config, at_scenes, plain, digits, tmp_path, probe):
    cfg = tiny_config()
    for role in ("train", "test"):
        cfg.dataloader[role].dataset = L(build_dataset)(name="image_folder", root=str(digits), split=role)
    LazyConfig.save(cfg, tmp_path / "mine.yaml")
    arguments = [plain, "--architecture", "test_resnet", *STATISTICS, "--size", 28, "--json"]
    config = ["--config-file", tmp_path / "mine.yaml"]
    expected = json.loads(probe(*arguments, "--train-folder", digits / "train", "--test-folder", digits / "test")[1])
    assert json.loads(probe(*arguments, *config)[1]) == expected
    swapped = json.loads(probe(*arguments, *config, "dataloader.train.dataset.split=test")[1])
    assert swapped["train_images"] == 40
    LazyConfig.save(tiny_config(), tmp_path / "boxes.yaml")
    status, _, err = probe(*arguments, "--config-file", tmp_path / "boxes.yaml")
    assert status == 1 and "targets of type dict; probes need class labels" in err


def test_errors_are_one_message(probe, plain, folders, tmp_path):
    named = [plain, "--architecture", "test_resnet", *folders]
    cases = [
        (["nothing.safetensors", *folders], "There is no file nothing.safetensors"),
        ([plain, *folders], "cannot be inferred from its tensors"),
        ([plain, "--architecture", "resnet18", *folders], "tensors match"),
        ([*named, "--size", 28], "Give --mean and --std"),
    ]
    for arguments, message in cases:
        status, out, err = probe(*arguments)
        assert (status, out) == (1, "") and message in err and err.count("error: ") == 1, err
    vit = timm.create_model("test_vit", num_classes=0)
    save_backbone(StoredBackbone(vit.state_dict(), "test_vit", pixels=PIXELS), tmp_path / "vit.safetensors")
    status, _, err = probe(tmp_path / "vit.safetensors", *folders, "--size", 28)
    assert status == 1 and "this test_vit does not accept images of 28 pixels" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --config-file, or --train-folder and --test-folder"),
        (["--train-folder", "a", "--test-folder", "b", "train.seed=1"], "overrides without a --config-file"),
        (["--config-file", "c", "--mean", 0, 0, 0], "--mean and --std go together"),
        (["--config-file", "c", "--batch-size", 0], "--batch-size must be 1 or more"),
    ],
)
def test_invalid_command_lines_are_refused(tool, capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        tool.cli(["zoo:tiny", *map(str, arguments)])
    assert ended.value.code == 2 and message in capsys.readouterr().err
