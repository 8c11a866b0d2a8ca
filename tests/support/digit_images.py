"""Handwritten digits as an image folder."""

import torch
from sklearn.datasets import load_digits
from torchvision.transforms.functional import to_pil_image


def write_digit_folder(root, train=60, test=40, classes=4):
    """Write `root`/{train,test}/CLASS/*.png, 36 pixels wide and 40 high, and return `root`."""
    digits = load_digits(n_class=classes)
    for index in range(train + test):
        folder = root / ("train" if index < train else "test") / str(digits.target[index])
        folder.mkdir(parents=True, exist_ok=True)
        image = torch.tensor(digits.images[index] / 16, dtype=torch.float32).expand(3, 8, 8)
        to_pil_image(image).resize((36, 40)).save(folder / f"{index}.png")
    return root
