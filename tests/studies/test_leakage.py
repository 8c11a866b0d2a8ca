"""Near-duplicates between data sets."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter

from bissl_zoo.data import ImageFolder
from bissl_zoo.studies.leakage import find_leakage

TRASHNET = Path(__file__).parents[2].parent / "shared/data/trashnet"


class Images:
    def __init__(self, images, prefix):
        self.images, self.prefix = images, prefix

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], 0

    def source(self, index):
        return f"{self.prefix}{index}"


def photographs(count, seed):
    generator = np.random.default_rng(seed)
    noise = [Image.fromarray(generator.integers(0, 256, (9, 12, 3), dtype=np.uint8)) for _ in range(count)]
    return [image.resize((120, 90), Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(2)) for image in noise]


def copies(image):
    compressed = io.BytesIO()
    image.save(compressed, "JPEG", quality=50)
    return [image.resize((60, 45)), Image.open(compressed), ImageEnhance.Brightness(image).enhance(0.7)]


def test_scaled_recompressed_and_darker_copies_are_found_and_named():
    train, others = photographs(30, seed=0), photographs(30, seed=1)
    (leakage,) = find_leakage({"train": Images(train, "a"), "test": Images([*others, *copies(train[4])], "b")})
    assert (leakage.first, leakage.second, leakage.count, leakage.total) == ("train", "test", 3, 33)
    assert leakage.examples == (("a4", "b30"), ("a4", "b31"), ("a4", "b32"))
    assert "3 of 33 images of test" in str(leakage)


def test_distinct_images_plain_images_and_the_same_files_are_no_near_duplicates():
    plain = [Image.new("RGB", (50, 50), (value, value, value)) for value in (0, 128, 255)]
    first, second = photographs(30, seed=0), photographs(30, seed=1)
    assert find_leakage({"train": Images(first + plain, "a"), "test": Images(second + plain, "b")}) == []
    assert find_leakage({"pretext": Images(first, "a"), "train": Images(first, "a")}) == []


@pytest.mark.skipif(not TRASHNET.is_dir(), reason="needs the data set trashnet")
def test_two_photographs_of_one_scene_in_trashnet_are_found():
    train, test = (ImageFolder(str(TRASHNET / split / "paper"), labelled=False) for split in ("train", "test"))
    (leakage,) = find_leakage({"train": train, "test": test})
    assert (Path(leakage.examples[0][0]).name, Path(leakage.examples[0][1]).name) == ("paper108.jpg", "paper101.jpg")
