"""Binarization: weights and activations of one bit."""

from typing import ClassVar, Literal

from keras_compress.algorithms.base import Algorithm
from keras_compress.algorithms.quantizer_options import QuantizerInitializer, StagedParams
from keras_compress.options import number, option


class Binarization(Algorithm):
    """Binarization of convolutions by XNOR-Net or DoReFa-Net."""

    name: ClassVar[str] = "binarization"
    built: ClassVar[bool] = False

    mode: Literal["xnor", "dorefa"] = option(
        "xnor", "xnor: one weight scale per filter; dorefa: one per tensor."
    )
    initializer: QuantizerInitializer = option(
        QuantizerInitializer(), "What happens right after binarizers have been placed."
    )
    params: StagedParams = option(StagedParams(), "Staged switch-on.")
    compression_lr_multiplier: number(0) | None = option(
        None, "Factor on the gradient of scales; the top-level key when not given."
    )
