"""Fake quantization by torch's own operations: what computes in evaluation, and is exported."""

import numpy as np
import torch

from keras_compress.binary_quantizers import BinaryActivations
from keras_compress.export.saved_model import CODES, binary_slope, wide_range
from keras_compress.quantizers import UniformQuantizer


class FakeQuantize(torch.nn.Module):
    """Rounds a tensor to a fixed grid: what `strip` leaves on an edge.

    Shapes: any, the same out. With scale s and zero point z, of the tensor or of each channel:

        y = s * (clip(round(x / s) + z, 0, 255) - z)

    A grid of fewer levels is a clip to its own range before that. One of two levels, zero and s, is
    a steep slope before it, cut off at zero and s: see `export.saved_model.FixedBinarize`.

    Args:
        quantizer: the `Quantizer` of an edge, whose range is set.
        input_step: step of the grid that x lies on, or None; for one of two levels.

    Raises:
        ValueError: its steps are not equal, or there are ranges along several axes.
    """

    def __init__(self, quantizer, input_step=None):
        super().__init__()
        step = quantizer.step()
        if not has_operation(quantizer):
            raise ValueError(
                "Expected activation quantizers with equal steps, for the tensor or along one "
                f"axis. Received: '{quantizer.path}' ({type(quantizer).__name__}, ranges of shape "
                f"{step.shape})"
            )
        low, high = quantizer.effective_range()
        self.axis = next((axis for axis, size in enumerate(step.shape) if size > 1), None)
        self.last = CODES - 1
        self.bounds = self.slope = None
        if isinstance(quantizer, BinaryActivations):
            *self.slope, _ = binary_slope(quantizer, input_step)
            self.bounds = float(low), float(high)
        elif self.axis is not None:
            self.last = quantizer.levels - 1
        elif quantizer.levels < CODES:
            self.bounds = float(low.reshape(())), float(high.reshape(()))
            low, _ = wide_range(low, high, step, quantizer.levels)
        shape = () if self.axis is None else (-1,)
        zero = np.rint(-low / step).astype("int32")
        self.register_buffer("scale", torch.tensor(step).reshape(shape))
        self.register_buffer("zero_point", torch.tensor(zero).reshape(shape))

    def forward(self, inputs):
        """Return the rounded tensor."""
        values = inputs.float() if inputs.dtype != torch.float32 else inputs
        if self.slope is not None:
            zero, factor = self.slope
            values = (values - zero) * factor
        if self.bounds is not None:
            values = torch.clamp(values, *self.bounds)
        if self.axis is None:
            values = torch.fake_quantize_per_tensor_affine(
                values, self.scale, self.zero_point, 0, self.last
            )
        else:
            values = torch.fake_quantize_per_channel_affine(
                values, self.scale, self.zero_point, self.axis, 0, self.last
            )
        return values if inputs.dtype == torch.float32 else values.to(inputs.dtype)


def has_operation(quantizer):
    """Whether torch has an operation for the grid of a quantizer: equal steps, one axis at most."""
    kept = [size for size in quantizer.step().shape if size > 1]
    return isinstance(quantizer, (UniformQuantizer, BinaryActivations)) and len(kept) < 2
