"""Constant sparsity: zeros that stay."""

from typing import ClassVar

from keras_compress.algorithms.weight_sparsity import WeightSparsity
from keras_compress.weight_masks import WeightMask


class ConstSparsity(WeightSparsity):
    """Keeps the zeros that a model already has, while it is trained on."""

    name: ClassVar[str] = "const_sparsity"

    def make_mask(self, config, node, weight):
        """Returns what makes a `WeightMask`, and its description."""
        return self.named(WeightMask), "mask of the zeros that are there"

    def start(self, model, batches) -> None:
        """Switches off the weights that are zero."""
        for entry in self.masked(model):
            entry.mask.set_mask(entry.value() != 0)
