"""The objects of a detection set as images with one label each."""

from typing import Any

from PIL import Image
from torch.utils.data import Dataset

from bissl_zoo.engine.features import CROP
from bissl_zoo.report.images.drawing import as_pixels


class BoxCrops(Dataset):
    """`(crop, label)` of every object of a detection set that is not difficult; the crop is a square around its box.

    The longer side of the box is 0.875 of the square, what :class:`bissl_zoo.engine.features.CentralCrops` keeps of
    it. Squares stay within the image: they are moved inwards, and no longer than the shorter side of the image.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        read = getattr(dataset, "target", None) or (lambda index: dataset[index][1])  # without decoding, where it can
        self.objects: list[tuple[int, int, tuple[float, ...], int]] = []
        for index in range(len(dataset)):
            target: dict[str, Any] = read(index)
            rows = zip(*(target[key].tolist() for key in ("boxes", "labels", "difficult")), strict=True)
            self.objects += [
                (index, number, tuple(box), label) for number, (box, label, hard) in enumerate(rows) if not hard
            ]

    def __len__(self) -> int:
        return len(self.objects)

    def __getitem__(self, place: int) -> tuple[Image.Image, int]:
        index, _, box, label = self.objects[place]
        image = self.dataset[index][0]
        if not isinstance(image, Image.Image):
            image = Image.fromarray(as_pixels(image))
        return image.crop(square_around(box, image.size)), label

    def source(self, place: int) -> str:
        """The image's file and the number of the object in it."""
        index, number, _, _ = self.objects[place]
        source = getattr(self.dataset, "source", None)
        return f"{source(index) if source else index}#{number}"


def square_around(box: tuple[float, ...], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The square around a box in an image of this width and height, as x0, y0, x1, y1 in whole pixels."""
    x0, y0, x1, y1 = box
    side = max(1, min(round(max(x1 - x0, y1 - y0) / CROP), *size))
    corner = [round((low + high - side) / 2) for low, high in ((x0, x1), (y0, y1))]
    left, top = (min(max(start, 0), whole - side) for start, whole in zip(corner, size, strict=True))
    return left, top, left + side, top + side
