import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest

from bissl_zoo.data import DigitScenes
from bissl_zoo.data.datasets.digit_scenes import _sources
from bissl_zoo.errors import DatasetError

FEW = {"unlabeled": 4, "train": 12, "val": 3, "test": 5}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("datasets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BISSL_ZOO_DATASETS", str(root))
        yield {split: DigitScenes(split, **FEW) for split in FEW}


def digest(folder):
    """Return the sha256 of the names and contents of all files below a folder."""
    found = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        found.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return found.hexdigest()


def write(root, monkeypatch, **arguments):
    monkeypatch.setenv("BISSL_ZOO_DATASETS", str(root))
    DigitScenes(**{**FEW, **arguments})
    (folder,) = root.iterdir()
    return folder


def test_scene_holds_one_to_three_digits_with_boxes_inside_it(scenes):
    for split in ("train", "val", "test"):
        for index in range(len(scenes[split])):
            image, target = scenes[split][index]
            boxes = target["boxes"].numpy()
            assert image.size == (96, 96)
            assert 1 <= len(boxes) <= 3 and not target["difficult"].any()
            assert boxes.min() >= 0 and boxes.max() <= 96
            heights = boxes[:, 3] - boxes[:, 1]
            assert heights.min() >= 15 and heights.max() <= 52


def test_box_is_tight_around_ink_that_stands_out(scenes):
    # Ink lies in the box and not beside it: its outermost rows differ from the background more than those just outside.
    inside, outside = [], []
    for index in range(len(scenes["train"])):
        image, target = scenes["train"][index]
        gray = np.asarray(image.convert("L"), dtype=float)
        for x0, y0, x1, y1 in target["boxes"].int().tolist():
            if 4 < y0 and y1 < 92:
                inside.append(np.ptp(gray[y0, x0:x1]))
                outside.append(np.ptp(gray[y0 - 3, x0:x1]))
    assert np.mean(inside) > 1.5 * np.mean(outside)


def test_no_handwriting_sample_serves_two_splits():
    from sklearn.datasets import load_digits

    ink = [sample.tobytes() for source in _sources(0).values() for sample in source.ink]
    every = [(sample / 16.0).tobytes() for sample in load_digits().images]
    assert sorted(ink) == sorted(every)


def test_same_arguments_give_the_same_bytes_and_another_seed_gives_others(tmp_path, monkeypatch):
    folders = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        folders.append(write(tmp_path / name, monkeypatch, seed=seed))
    assert folders[0].name == folders[1].name != folders[2].name
    assert digest(folders[0]) == digest(folders[1]) != digest(folders[2])


@pytest.mark.slow
def test_processes_that_write_at_once_leave_one_complete_set(tmp_path):
    script = f"from bissl_zoo.data import DigitScenes; print(len(DigitScenes('train', **{FEW})))"
    environment = {**os.environ, "BISSL_ZOO_DATASETS": str(tmp_path)}
    command = [sys.executable, "-c", script]
    running = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for process in running:
        assert process.communicate(timeout=120)[0].strip() == "12"
        assert process.returncode == 0
    assert len(list(tmp_path.iterdir())) == 1


def test_root_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("BISSL_ZOO_DATASETS", str(tmp_path / "file"))
    with pytest.raises(DatasetError, match="cannot be written to .*BISSL_ZOO_DATASETS"):
        DigitScenes(**FEW)


def test_unknown_split_and_impossible_numbers_are_refused():
    with pytest.raises(DatasetError, match=r"no split 'trian'. Did you mean 'train'\?"):
        DigitScenes("trian")
    with pytest.raises(DatasetError, match="image_size 8"):
        DigitScenes(image_size=8)
    with pytest.raises(DatasetError, match="at least one image"):
        DigitScenes(val=0)
