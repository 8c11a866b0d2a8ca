"""The images of a multi-label set with one label each: their only class, or that they have several or none."""

from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

#: the names of the two labels that come after the classes
MIXED = ["several classes", "no class"]


class OneClass(Dataset):
    """`(image, label)` of a multi-label set of K classes: the only class of an image, K for several, K + 1 for none.

    Classes whose target is -1, such as the difficult ones of VOC, do not count.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.dataset, self.count = dataset, len(dataset.classes)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, target = self.dataset[index]
        return image, self._label(target)

    def _label(self, target: Tensor) -> int:
        present = (target == 1).nonzero().flatten().tolist()
        if len(present) == 1:
            return present[0]
        return self.count if present else self.count + 1

    def source(self, index: int) -> str:
        """The image's file, or its number where the set does not know files."""
        source = getattr(self.dataset, "source", None)
        return source(index) if source else str(index)
