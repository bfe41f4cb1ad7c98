"""Constant sparsity: zeros that stay."""

from typing import ClassVar

from keras_compress.algorithms.base import Algorithm


class ConstSparsity(Algorithm):
    """Keeps the zeros that a model already has, while it is trained on."""

    name: ClassVar[str] = "const_sparsity"
    built: ClassVar[bool] = False
