"""Regularization-based sparsity: masks that are learnt."""

from typing import ClassVar, Literal

from keras_compress.algorithms.base import Algorithm
from keras_compress.algorithms.sparsity_options import Sparsity, SparsityParams
from keras_compress.options import number, option


class RBSparsityParams(SparsityParams):
    """Course of the level that the loss asks for."""

    schedule: Literal["polynomial", "exponential", "adaptive", "multistep"] = option(
        "exponential", "Course of the level."
    )


class RBSparsity(Algorithm):
    """Sparsity by random masks whose probabilities are trained."""

    name: ClassVar[str] = "rb_sparsity"
    built: ClassVar[bool] = False
    adjustable: ClassVar[bool] = True

    sparsity_init: Sparsity = option(0.0, "Sparsity to start with.")
    params: RBSparsityParams = option(RBSparsityParams(), "Course of the level.")
    compression_lr_multiplier: number(0) | None = option(
        None, "Factor on the gradient of masks; the top-level key when not given."
    )
