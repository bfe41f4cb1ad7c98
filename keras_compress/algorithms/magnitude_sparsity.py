"""Magnitude sparsity: small weights set to zero."""

from typing import ClassVar, Literal

from keras_compress.algorithms.base import Algorithm, Initializer
from keras_compress.algorithms.sparsity_options import Sparsity, SparsityParams
from keras_compress.options import number, option


class MagnitudeSparsityParams(SparsityParams):
    """Course of the level, and the score of a weight."""

    schedule: Literal["polynomial", "exponential", "adaptive", "multistep"] = option(
        "polynomial", "Course of the level."
    )
    weight_importance: Literal["normed_abs", "abs"] = option(
        "normed_abs", "normed_abs: magnitude over the norm of the layer; abs: magnitude."
    )


class MagnitudeSparsity(Algorithm):
    """Sparsity that zeroes the weights of least magnitude."""

    name: ClassVar[str] = "magnitude_sparsity"
    built: ClassVar[bool] = False
    adjustable: ClassVar[bool] = True

    sparsity_init: Sparsity = option(0.0, "Sparsity to start with.")
    initializer: Initializer = option(Initializer(), "What happens right after masks are placed.")
    params: MagnitudeSparsityParams = option(MagnitudeSparsityParams(), "Course and score.")
    compression_lr_multiplier: number(0) | None = option(
        None, "Accepted for the shared format; this algorithm trains no parameters of its own."
    )
