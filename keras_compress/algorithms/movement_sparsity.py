"""Movement sparsity: weights that shrink in training set to zero."""

from typing import ClassVar, Literal

from keras_compress.algorithms.base import Algorithm
from keras_compress.options import Flag, Options, integer, number, option
from keras_compress.scopes import Scopes


class SparseStructure(Options):
    """The pattern in which weights of some layers are zeroed."""

    mode: Literal["fine", "block", "per_dim"] = option(
        "fine", "fine: single weights; block: rectangles; per_dim: slices along one axis."
    )
    sparse_factors: tuple[integer(1), ...] | None = option(None, "Size of a block.")
    axis: integer() | None = option(None, "Axis of the slices.")
    target_scopes: Scopes | None = option(None, "The layers it holds for.")


class MovementSparsityParams(Options):
    """Course of the threshold and of the regularization."""

    warmup_start_epoch: number(0) = option(..., "Epoch that begins the warm-up.")
    warmup_end_epoch: number(0) = option(..., "Epoch that ends it.")
    importance_regularization_factor: number(0) = option(..., "Final weight of the penalty.")
    enable_structured_masking: Flag = option(
        True, "Whether masks become whole structures after the warm-up."
    )
    power: number(0) = option(3.0, "Exponent of the course.")
    init_importance_threshold: number() | None = option(
        None, "Threshold to start with; found from the weights when not given."
    )
    final_importance_threshold: number() = option(0.0, "Threshold to end with.")
    steps_per_epoch: integer(1) | None = option(None, "Steps in an epoch.")


class MovementSparsity(Algorithm):
    """Sparsity that zeroes the weights that training moves towards zero."""

    name: ClassVar[str] = "movement_sparsity"
    built: ClassVar[bool] = False

    params: MovementSparsityParams = option(..., "Course of threshold and penalty.")
    sparse_structure_by_scopes: tuple[SparseStructure, ...] = option((), "Patterns by layer.")
    compression_lr_multiplier: number(0) | None = option(
        None, "Factor on the gradient of importances; the top-level key when not given."
    )
