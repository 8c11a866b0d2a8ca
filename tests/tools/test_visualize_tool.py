"""tools/visualize.py: every command, where its images go, and what it refuses."""

import pytest
from command_line import load_tool
from PIL import Image
from safetensors.torch import save_file

from bissl_zoo.config import LazyConfig
from bissl_zoo.engine.runner import run
from bissl_zoo.registry import build_backbone
from bissl_zoo.weights.files import StoredBackbone, save_backbone


@pytest.fixture(scope="module")
def visualizer():
    """The module tools/visualize.py."""
    return load_tool("visualize")


@pytest.fixture
def visualize(visualizer, capsys, at_scenes, tmp_path, monkeypatch):
    """Call the command line in a folder of its own: status, standard output and standard error."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        status = visualizer.cli([*map(str, arguments)])
        said = capsys.readouterr()
        return status, said.out, said.err

    return call


@pytest.fixture
def config(tiny_config, tmp_path):
    """The tiny config as a file."""
    LazyConfig.save(tiny_config(), tmp_path / "tiny.yaml")
    return tmp_path / "tiny.yaml"


def size(path):
    with Image.open(path) as image:
        image.load()
        return image.size


@pytest.mark.slow
def test_data_of_each_split_is_drawn_to_a_file_of_its_own(visualize, config, tmp_path):
    for split in ("train", "test", "pretext"):
        status, out, err = visualize("data", "--config-file", config, "--split", split, "--images", 3)
        assert status == 0, err
        assert out == f"image images/data_{split}.png\n"
        assert min(size(tmp_path / "images" / f"data_{split}.png")) > 300
    files = [tmp_path / "images" / f"data_{split}.png" for split in ("train", "test", "pretext")]
    assert len({file.read_bytes() for file in files}) == 3


def test_views_take_overrides_before_and_after_options(visualize, config, tmp_path):
    small = ["pretext.augmentation.size=16", "--images", 2, "--output", "a=b.png", "+pretext.augmentation.mean=[0,0,0]"]
    status, out, err = visualize("views", *small, "--config-file", config)
    assert (status, out) == (0, "image a=b.png\n"), err
    assert size(tmp_path / "a=b.png")


@pytest.mark.slow
def test_predictions_of_a_run_go_to_its_own_folder(visualize, run_copy, tmp_path):
    run_copy = run_copy.rename(tmp_path / "lr=0.1")  # a name that is no override
    status, out, err = visualize("predictions", run_copy, "--images", 2)
    assert status == 0, err
    default = run_copy / "images" / "predictions.png"
    assert out == f"image {default}\n" and size(default)
    first = default.read_bytes()
    config = ["--config-file", run_copy / "config.yaml", f"train.init='{run_copy}'"]
    status, _, err = visualize("predictions", *config, "--random", "--images", 2)
    assert status == 0 and default.read_bytes() == first, err  # the same figure, the same bytes
    other = ["--seed", 5, "--threshold", 0.9, "--output", "other.png"]
    status, _, err = visualize("predictions", run_copy, "--images", 2, *other)
    assert status == 0 and (tmp_path / "other.png").read_bytes() != first, err


@pytest.mark.slow
def test_embeddings_of_a_run_an_entry_and_a_file_lie_side_by_side(visualize, run_copy, config, tmp_path):
    model = build_backbone(name="test_resnet")
    save_file(model.state_dict(), tmp_path / "plain.safetensors")
    save_backbone(StoredBackbone(model.state_dict(), "test_resnet"), tmp_path / "ours.safetensors")
    status, out, err = visualize("embeddings", run_copy, "--images", 12)
    assert status == 0, err
    two = size(run_copy / "images" / "embeddings.png")
    sources = [run_copy, "plain.safetensors", "--architecture", "test_resnet", "ours.safetensors"]
    status, out, err = visualize("embeddings", *sources, "--config-file", config, "--images", 12)
    assert status == 0, err
    four = size(run_copy / "images" / "embeddings.png")
    assert four[0] > 1.9 * two[0]


@pytest.mark.slow
def test_errors_are_one_message(visualize, config, tiny_config, tmp_path, capsys):
    cfg = tiny_config(train__output_dir=tmp_path / "run", train__stages="[pretrain]", train__publish__name="null")
    run(cfg, "test")
    capsys.readouterr()
    unlabelled = "dataloader.test.dataset.split=unlabeled"
    named = ["--config-file", config]
    cases = [
        (["data"], "Give --config-file or the directory of a run."),
        (["data", *named, "--split", "test", unlabelled], "reads an unlabelled data set"),
        (["data", *named, "--output", "a.gif"], "must end in .png, .pdf, .svg"),
        (["data", *named, "--split", "val"], "no usable 'dataloader.val'"),
        (["predictions", *named], "Predictions need a fine-tuned model"),
        (["predictions", tmp_path / "run"], "There is no fine-tuned model in"),
        (["embeddings", tmp_path / "run", "--images", 2], "needs 3 or more"),
        (["embeddings", "zoo:nothing", *named], "nothing"),
    ]
    for arguments, message in cases:
        status, out, err = visualize(*arguments)
        assert (status, out) == (1, "") and message in err and err.count("error: ") == 1, (arguments, err)
    assert not (tmp_path / "images").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["draw"], "invalid choice: 'draw'"),
        (["embeddings", "--config-file", "a"], "give a SOURCE"),
        (["data", "a", "--config-file", "b"], "give --config-file, or one run directory"),
        (["views", "--config-file", "a", "--images", "0"], "--images must be 1 or more"),
        (["predictions", "a", "--worst", "--random"], "not allowed with argument"),
    ],
)
def test_invalid_command_lines_are_refused(visualizer, capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        visualizer.cli(arguments)
    assert ended.value.code == 2 and message in capsys.readouterr().err
