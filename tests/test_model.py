"""A fine-tuned model is saved as data, loaded without its run, and predicts images of any kind."""

import json
import shutil

import numpy as np
import pytest
import torch
from models import CLASSES, new_model, photo
from PIL import Image
from safetensors.torch import load_file, save_file

from bissl_zoo.config import LazyConfig
from bissl_zoo.downstream import Classification, DownstreamTask
from bissl_zoo.engine.publishing import publish_run
from bissl_zoo.errors import BisslZooError, DatasetError, ZooError
from bissl_zoo.files import sha256_of
from bissl_zoo.model import load_model
from bissl_zoo.registry import DOWNSTREAM_TASKS
from bissl_zoo.runs.directory import load_run_config
from bissl_zoo.zoo import Zoo

SIZE = 64


def detector(**changed):
    sizes = {"min_size": SIZE, "max_size": 2 * SIZE, "box_head": 16, "anchor_sizes": [16, 32], "sampling_ratio": 1}
    return new_model("faster_rcnn", "c3", **{**sizes, "score_threshold": 0.0, **changed})


def classifier(task="classification"):
    return new_model(task, image_size=32)


@pytest.mark.parametrize("build", [classifier, detector])
def test_a_saved_model_is_the_same_after_loading(build, tmp_path):
    model = build()
    loaded = load_model(model.save(tmp_path / "model"))
    assert sorted(file.name for file in (tmp_path / "model").iterdir()) == [
        *("SHA256SUMS", "model.json", "model.safetensors")
    ]
    assert loaded.predict(photo()) == model.predict(photo()) and loaded.classes == CLASSES
    assert loaded.metrics == {"top1": 0.5} and not loaded.task.training
    assert loaded.metadata["preprocessing"]["mean"] == pytest.approx([0.485, 0.456, 0.406])
    model.save(tmp_path / "model")  # replaces it
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_predictions_of_classifiers_are_names_and_probabilities():
    model = classifier()
    result = model.predict(photo())
    transform = model.task.transform(train=False)
    with torch.no_grad():
        maps = model.backbone(transform(photo(), 0)[0][None])[model.task.stage]
        expected = model.task.linear(maps.mean((2, 3))).softmax(1)[0]
    assert list(result["probabilities"]) == CLASSES
    assert list(result["probabilities"].values()) == pytest.approx(expected.tolist(), abs=1e-6)
    assert result["label"] == CLASSES[expected.argmax()] and result["score"] == pytest.approx(expected.max().item())
    several = classifier("multilabel_classification")
    probabilities = several.predict(photo(), threshold=0.0)["probabilities"]
    middle = sorted(probabilities.values())[1]
    likely = several.predict(photo(), threshold=middle)
    assert likely["labels"] == sorted(CLASSES, key=probabilities.get, reverse=True)[:2]
    assert likely["scores"] == sorted(probabilities.values(), reverse=True)[:2]


def test_boxes_are_in_pixels_of_the_original_image_best_first():
    model = detector()
    result = model.predict(photo(160, 128), threshold=0.0)
    boxes, scores = torch.tensor(result["boxes"]), result["scores"]
    assert len(boxes) == len(scores) == len(result["labels"]) and scores == sorted(scores, reverse=True)
    assert boxes[:, 2].max() > 128 and boxes[:, 2].max() <= 160 and boxes[:, 3].max() <= 128
    assert set(result["labels"]) <= set(CLASSES)
    middle = scores[len(scores) // 2]
    assert model.predict(photo(160, 128), threshold=middle)["scores"] == [s for s in scores if s >= middle]


def test_all_forms_of_an_image_give_the_same(tmp_path):
    model, image = classifier(), photo()
    image.save(tmp_path / "a.png")
    array = np.asarray(image)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    expected = model.predict(image)
    for form in (array, tensor, tensor / 255):
        assert model.predict(form) == expected
    assert model.predict(str(tmp_path / "a.png")) == {"image": str(tmp_path / "a.png"), **expected}
    assert model.predict([image, tmp_path / "a.png"])[1]["label"] == expected["label"]
    gray = model.predict(np.full((40, 40), 9, np.uint8))
    assert gray == model.predict(torch.full((1, 40, 40), 9, dtype=torch.uint8))
    turned = image.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by 90 degrees
    turned.save(tmp_path / "turned.png", exif=exif)
    assert model.predict(tmp_path / "turned.png")["probabilities"] == expected["probabilities"]
    for wrong in (torch.zeros(2, 3, 40, 40), tensor / 100, 3):
        with pytest.raises(DatasetError, match="predict takes paths, PIL images"):
            model.predict(wrong)


def test_a_folder_is_predicted_in_batches_and_unreadable_images_are_skipped(tmp_path, capsys):
    model = classifier()
    for number in range(5):
        photo(seed=number).save(tmp_path / f"{number}.png")
    (tmp_path / "2.png").write_bytes(b"no image")
    results = model.predict(tmp_path, batch_size=2)
    assert [result["image"] for result in results] == [str(tmp_path / f"{n}.png") for n in (0, 1, 3, 4)]
    alone = [model.predict(photo(seed=n))["probabilities"] for n in (0, 1, 3, 4)]
    for result, other in zip(results, alone, strict=True):
        assert list(result["probabilities"].values()) == pytest.approx(list(other.values()), abs=1e-5)
    assert "2.png does not decode" in capsys.readouterr().out
    assert [r and r["label"] for r in model.predict([tmp_path / "2.png", tmp_path / "3.png"])] == [
        *(None, results[2]["label"])
    ]
    assert model.predict([]) == []
    with pytest.raises(DatasetError, match="2.png does not decode"):
        model.predict(tmp_path / "2.png")


def test_bfloat16_is_near_float32():
    model = classifier()
    exact, rounded = (model.predict(photo(), bf16=bf16)["probabilities"].values() for bf16 in (False, True))
    assert list(exact) != list(rounded) and list(exact) == pytest.approx(list(rounded), abs=0.02)


@pytest.mark.slow
def test_a_drawn_prediction_is_a_picture_of_the_image():
    assert detector().draw(photo(160, 80)).size == pytest.approx((600, 360), abs=1)


@pytest.mark.parametrize("file", ["model.json", "model.safetensors", "SHA256SUMS"])
def test_a_flipped_bit_is_named(file, tmp_path):
    folder = classifier().save(tmp_path / "model")
    content = bytearray((folder / file).read_bytes())
    content[len(content) // 2] ^= 0x80
    (folder / file).write_bytes(content)
    with pytest.raises(ZooError, match=f"{file} (is damaged|cannot be read)"):
        load_model(folder)


def edited(folder, change):
    """Apply `change` to model.json as an attacker would, who also writes the new digests."""
    metadata = json.loads((folder / "model.json").read_text())
    change(metadata)
    (folder / "model.json").write_text(json.dumps(metadata))
    files = ("model.json", "model.safetensors")
    (folder / "SHA256SUMS").write_text("".join(f"{sha256_of(folder / file)}  {file}\n" for file in files))
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["task"].update(name="counting"), r"'counting' is not registered.*mine\.py"),
        (lambda m: m["backbone"].update(name="mynet"), "backbone 'mynet' is not registered"),
        (lambda m: m["task"]["arguments"].update(overrides={"a": {"_target_": "os.system"}}), "task.overrides is not"),
        (
            lambda m: m["backbone"]["arguments"].update(pretrained_cfg_overlay={"file": "/x"}),
            "not an accepted argument",
        ),
        (lambda m: m["task"]["arguments"].update(image_size=-1), "task.image_size is -1"),
        (lambda m: m["classes"].pop(), "2 of another shape"),
        (lambda m: m.update(format=2), "format 2"),
        (lambda m: m.pop("task"), "not a model of this package"),
        (lambda m: m.update(classes=[1, 2, 3]), "not text"),
    ],
)
def test_a_model_that_cannot_be_built_is_refused_with_the_reason(change, message, tmp_path):
    with pytest.raises(BisslZooError, match=message):
        load_model(edited(classifier().save(tmp_path / "model"), change))


def test_weights_of_another_model_and_a_missing_model_are_refused(tmp_path):
    folder = classifier().save(tmp_path / "model")
    state = load_file(folder / "model.safetensors")
    state["task.other"] = state.pop("task.linear.bias")
    save_file(state, folder / "model.safetensors")
    with pytest.raises(ZooError, match=r"1 missing: task\.linear\.bias; 1 unexpected: task\.other"):
        load_model(edited(folder, lambda metadata: None))
    shutil.rmtree(folder)
    with pytest.raises(ZooError, match="no fine-tuned model in .*Give a run directory"):
        load_model(tmp_path)
    (tmp_path / "config.yaml").touch()
    with pytest.raises(ZooError, match="--resume"):
        load_model(tmp_path)


def test_a_user_task_needs_only_a_blank_target(tmp_path):
    @DOWNSTREAM_TASKS.register("brightness")
    class Brightness(Classification):
        describe = DownstreamTask.describe

    try:
        model = new_model("brightness", image_size=32)
        assert len(load_model(model.save(tmp_path / "model")).predict(photo())["prediction"]) == 3
    finally:
        DOWNSTREAM_TASKS._obj_map.pop("brightness")


# runs


def test_a_run_leaves_its_fine_tuned_models(finished, train_net, tmp_path):
    results = json.loads((finished / "results.json").read_text())
    for folder, start in (("model", "bissl"), ("model_pretrained", "pretrained")):
        model = load_model(finished / folder)
        assert model.metadata["start"] == start
        assert model.metrics == {k: v for k, v in results[start].items() if "/" not in k}
    shutil.copytree(finished / "model", tmp_path / "elsewhere")
    model = load_model(tmp_path / "elsewhere")
    assert model.classes == [str(digit) for digit in range(10)]
    assert load_model(finished).predict(photo(), threshold=0.0) == model.predict(photo(), threshold=0.0)


def test_an_entry_with_the_model_has_its_metrics_only_and_predicts(run_copy, tmp_path):
    cfg = load_run_config(run_copy)
    cfg.train.publish.model = True
    LazyConfig.save(cfg, run_copy / "config.yaml")
    entry = publish_run(run_copy, name="mine", zoo=Zoo(tmp_path / "zoo"))
    record = Zoo(tmp_path / "zoo").find("mine").metadata()
    assert {"task_model.json", "task_model.safetensors"} <= set(record["files"])
    assert "task_head.safetensors" not in record["files"]
    model = load_model(run_copy)
    assert {name: metric["values"] for name, metric in record["metrics"].items()} == {
        f"{name} (bissl)": [value] for name, value in model.metrics.items()
    }
    assert 'load_model("zoo:mine@1")' in (tmp_path / "zoo" / "mine" / "README.md").read_text()
    for source, zoo in (("zoo:mine", tmp_path / "zoo"), (entry.location, None)):
        assert load_model(source, zoo=zoo).predict(photo(), threshold=0.0) == model.predict(photo(), threshold=0.0)
    with open(tmp_path / "zoo" / "mine" / "task_model.json", "a") as file:
        file.write(" ")
    with pytest.raises(ZooError, match=r"task_model\.json"):
        load_model("zoo:mine", zoo=tmp_path / "zoo")


def test_an_entry_without_a_model_is_refused(run_copy, tmp_path):
    publish_run(run_copy, name="mine", zoo=Zoo(tmp_path / "zoo"))
    with pytest.raises(ZooError, match="train.publish.model=True"):
        load_model("zoo:mine", zoo=tmp_path / "zoo")


def test_a_finished_run_of_an_earlier_version_gets_its_model_by_resume(run_copy, train_net, tiny):
    expected = load_model(run_copy).predict(photo(), threshold=0.0)
    shutil.rmtree(run_copy / "model")
    with pytest.raises(ZooError, match="--resume"):
        load_model(run_copy)
    assert train_net("--resume", *tiny(), f"train.output_dir={run_copy}").status == 0
    assert load_model(run_copy).predict(photo(), threshold=0.0) == expected
