"""Masks of single weights: given ones, and those that are learnt along with the weights.

A learnt mask compares scores with a threshold. That step has no gradient of its own; one is passed
through it to a function s of the scores (straight-through), so that for an incoming gradient g

    y = x * z        dx = g * z        d scores = lr_multiplier * (g * x) * s'(scores)
"""

import math

import keras
import numpy as np
from keras import ops

from keras_compress.transforms import Transform

MODES = ("fine", "block", "per_dim")


class WeightMask(Transform):
    """Zeroes single weights.

    Shapes: `x` any, the same out; the variable `mask` as x, of booleans: a quarter of the memory of
    x. An axis of unknown size has one value for all its positions.

    Formula, and gradient for an incoming g:

        y = x where mask else 0        dx = g where mask else 0

    Invariants: `m(0) == 0` and `m(m(x)) == m(x)`, exactly. A new mask leaves everything on.

    Example:

    >>> mask = WeightMask()
    >>> mask.build((2, 2))
    >>> mask.set_mask([[1, 0], [1, 1]])
    >>> mask(np.array([[1.0, 2.0], [3.0, 4.0]], "float32")).numpy()
    array([[1., 0.],
           [3., 4.]], dtype=float32)
    >>> mask.sparsity
    0.25
    """

    def build(self, input_shape):
        self.mask = self.add_weight(
            name="mask",
            shape=_known(input_shape),
            initializer="ones",
            dtype="bool",
            trainable=False,
        )

    def call(self, inputs, training=None):
        return ops.where(ops.convert_to_tensor(self.mask), ops.convert_to_tensor(inputs), 0.0)

    def mask_values(self):
        """Return the mask that inference uses, a NumPy array of booleans.

        Raises:
            ValueError: it has not been built.
        """
        self._require_built()
        return np.array(ops.convert_to_numpy(self.mask))

    def set_mask(self, values):
        """Set the mask.

        Args:
            values: array of booleans, or of ones and zeros, shaped as the mask: true where the
                weight is on.

        Raises:
            ValueError: the mask has not been built, or `values` has another shape or other numbers.
        """
        self._require_built()
        values = np.asarray(values)
        if values.shape != tuple(self.mask.shape):
            raise ValueError(
                f"Expected one value per weight, shape {tuple(self.mask.shape)}. "
                f"Received: values of shape {values.shape}"
            )
        if values.dtype != bool and not np.isin(values, (0, 1)).all():
            raise ValueError(f"Expected booleans, or ones and zeros. Received: values={values}")
        self.mask.assign(values.astype(bool))

    @property
    def sparsity(self):
        """Fraction of zeros in the mask that inference uses."""
        return 1.0 - float(self.mask_values().mean())

    def _require_built(self):
        if not self.built:
            raise ValueError(
                f"Expected a mask that has been built. Received: '{self.name}' without variables."
            )


class LearnedMask(WeightMask, abstract=True):
    """Base of the masks that are made from trained scores, until they are fixed.

    Shapes: as for `WeightMask`, with a further boolean `frozen`, a variable `()`: true once `mask`
    holds and the scores have no part in it any more. It may change while `fit` runs.

    Formula, z being made of the scores as the subclass says:

        y = x * (mask if frozen else z)        d scores = 0 if frozen

    Args:
        lr_multiplier: factor on the gradient of the scores.
        **kwargs: as for a Keras layer.
    """

    def __init__(self, lr_multiplier=1.0, **kwargs):
        super().__init__(**kwargs)
        if not lr_multiplier >= 0:
            raise ValueError(f"Expected a factor of 0 or more. Received: {lr_multiplier=}")
        self.lr_multiplier = lr_multiplier

    def build(self, input_shape):
        super().build(input_shape)
        self.frozen = self.add_weight(
            name="frozen", shape=(), initializer="zeros", dtype="bool", trainable=False
        )

    def mask_values(self):
        self._require_built()
        return np.array(ops.convert_to_numpy(self._in_effect(self._learned())))

    def set_mask(self, values):
        """Fix the mask at the given values: the scores have no part in it any more.

        Args:
            values: as for `WeightMask.set_mask`.
        """
        super().set_mask(values)
        self.frozen.assign(True)

    def fix(self, values=None):
        """Fix the mask: at the given values, else at those that inference uses now."""
        self.set_mask(self.mask_values() if values is None else values)

    def get_config(self):
        return super().get_config() | {"lr_multiplier": self.lr_multiplier}

    def _add_scores(self, name, shape, initial):
        # Not cast under a mixed policy either, where a loss is made of them inside a layer.
        self._scores = self.add_weight(
            name=name, shape=shape, initializer=keras.initializers.Constant(initial), autocast=False
        )
        return self._scores

    @property
    def undecayed_variables(self):
        """The scores, a list."""
        return [self._scores] if self.built else []

    def _learned(self):
        """Return the mask that the scores give in inference, a tensor of booleans."""
        raise NotImplementedError(f"{type(self).__name__} must define `_learned`.")

    def _in_effect(self, on):
        return ops.where(ops.convert_to_tensor(self.frozen), ops.convert_to_tensor(self.mask), on)

    def _switches(self, on, passed):
        """Return the mask in effect, ones and zeros whose gradient goes to `passed`."""
        return self._through(ops.cast(self._in_effect(on), "float32"), passed)

    def _through(self, value, passed):
        """Return `value`, exactly, with the gradient of `passed` times the factor."""
        factor = ops.where(ops.convert_to_tensor(self.frozen), 0.0, float(self.lr_multiplier))
        return ops.stop_gradient(value) + factor * (passed - ops.stop_gradient(passed))


class RBMask(LearnedMask):
    """A mask drawn at random in training, of trained probabilities (regularization-based).

    Shapes: as for `LearnedMask`; the trained `logits` m as x. `level` is a variable `()` for the
    sparsity that a loss shall ask for; the mask itself does not read it.

    Formula, with sigmoid(m) the probability that a weight is on and `u ~ U(0, 1)` drawn for every
    call, clipped to [eps, 1 - eps]:

        training:    a = m + log(u / (1 - u))        z = 1[sigmoid(a) > 1/2]
        inference:   a = m

    Gradient: it passes unchanged through the threshold on the sigmoid, not through the sigmoid:

        dm = lr_multiplier * (g * x) * sigmoid(a) * (1 - sigmoid(a))

    Random numbers are drawn in training only, where the mask itself is trainable: a frozen layer
    computes in training what it computes in inference.

    Invariants: inference, and training once the mask is fixed, is that of `WeightMask`.

    Args:
        initial_probability: of each weight to be on, in (0, 1).
        lr_multiplier: factor on the gradient of the logits.
        seed: None, or int that makes the draws reproducible.
        **kwargs: as for a Keras layer.

    Reference: Louizos et al., "Learning sparse neural networks through L0 regularization"
    (arXiv:1712.01312), section 2; NNCF's RB sparsity has the same step and gradient.
    """

    epsilon = 1e-6

    def __init__(self, initial_probability=0.99, lr_multiplier=1.0, seed=None, **kwargs):
        super().__init__(lr_multiplier, **kwargs)
        if not 0 < initial_probability < 1:
            raise ValueError(
                "Expected a probability between 0 and 1, both left out. "
                f"Received: {initial_probability=}"
            )
        self.initial_probability = initial_probability
        self.seed = seed
        self.seed_generator = keras.random.SeedGenerator(seed)

    def build(self, input_shape):
        super().build(input_shape)
        p = self.initial_probability
        self.logits = self._add_scores("logits", _known(input_shape), math.log(p / (1 - p)))
        self.level = self.add_weight(
            name="level", shape=(), initializer="zeros", trainable=False, autocast=False
        )

    def call(self, inputs, training=None):
        a = ops.convert_to_tensor(self.logits)
        if training and self.trainable:
            a = a + self._noise()
        return inputs * self._switches(a > 0, ops.sigmoid(a))

    def kept(self):
        """Return (number of weights that inference keeps, number of weights), for a loss.

        The number kept is a tensor `()`, `sum 1[sigmoid(m) > 1/2]`. Its gradient passes through
        the threshold, `dm = lr_multiplier * g * sigmoid(m) * (1 - sigmoid(m))`; it is 0 once the
        mask is fixed.
        """
        a = ops.convert_to_tensor(self.logits)
        return ops.sum(self._switches(a > 0, ops.sigmoid(a))), math.prod(self.logits.shape)

    def _learned(self):
        return ops.convert_to_tensor(self.logits) > 0

    def _noise(self):
        u = keras.random.uniform(self.logits.shape, dtype="float32", seed=self.seed_generator)
        u = ops.clip(u, self.epsilon, 1 - self.epsilon)
        return ops.log(u) - ops.log1p(-u)

    def get_config(self):
        return super().get_config() | {
            "initial_probability": self.initial_probability,
            "seed": self.seed,
        }


class MovementMask(LearnedMask):
    """A mask of the weights that training does not move towards zero.

    Shapes: as for `LearnedMask`; the trained `importance` has one score per block of x, so its
    size along an axis is that of x divided by the block's. The `threshold` t is a variable `()`,
    not trained; a new one is minus infinity, which leaves everything on. So is `factor`, the weight
    that a loss gives to the penalty, 0 at first; the mask itself does not read it.

    | mode      | block                                     | importance of x `(6, 8)`           |
    |-----------|-------------------------------------------|------------------------------------|
    | `fine`    | a single weight                           | `(6, 8)`                           |
    | `block`   | `sparse_factors`, for the last axes       | `(2, 2)` with factors `(3, 4)`     |
    | `per_dim` | all weights of one index of `axis`        | `(1, 8)` with axis -1              |

    Formula, in training and in inference, each score repeated over its block:

        z = 1[importance > min(t, q)]

    q being the 98th percentile of the repeated scores, linear between two of them: of many scores,
    2 % stay on whatever the threshold is.

    Gradient: it passes through the threshold, which has none itself:

        d importance = lr_multiplier * sum over the block of g * x

    Once the mask is fixed it may hold any pattern, not of whole blocks only.

    Args:
        mode: `"fine"`, `"block"` or `"per_dim"`.
        sparse_factors: with `"block"`, the size of a block along the last axes of x, as many as
            are given; it divides that of x.
        axis: with `"per_dim"`, a negative int: the axis whose indices are switched off whole.
        lr_multiplier: factor on the gradient of the scores.
        **kwargs: as for a Keras layer.

    Example:

    >>> mask = MovementMask("per_dim", axis=-1)
    >>> mask.build((2, 3))
    >>> _ = mask.importance.assign([[-1.0, 0.5, 1.0]])
    >>> _ = mask.threshold.assign(0.0)
    >>> mask.mask_values()
    array([[False,  True,  True],
           [False,  True,  True]])

    Reference: Sanh et al., "Movement pruning" (arXiv:2005.07683), section 4; Lagunas et al.,
    "Block pruning for faster transformers" (arXiv:2109.04838), section 3.
    """

    percentile = 0.98

    def __init__(self, mode="fine", sparse_factors=None, axis=None, lr_multiplier=1.0, **kwargs):
        super().__init__(lr_multiplier, **kwargs)
        self.mode, self.sparse_factors, self.axis = _checked_structure(mode, sparse_factors, axis)

    def build(self, input_shape):
        super().build(input_shape)
        shape = _known(input_shape)
        self.block = self._block_of(shape)
        self.importance = self._add_scores("importance", self._score_shape(shape), 0.0)
        self.threshold = self.add_weight(
            name="threshold",
            shape=(),
            initializer=keras.initializers.Constant(-math.inf),
            trainable=False,
            autocast=False,
        )
        self.factor = self.add_weight(
            name="factor", shape=(), initializer="zeros", trainable=False, autocast=False
        )

    def state_axes(self, variable):
        """Return the axes, as for `Transform`: None where one position of the state is a block."""
        axes = super().state_axes(variable)
        if variable is not self.importance:
            return axes
        sizes = zip(axes, variable.shape, self.block, strict=True)
        return tuple(None if size > 1 and factor > 1 else axis for axis, size, factor in sizes)

    def call(self, inputs, training=None):
        passed = self._repeated(ops.convert_to_tensor(self.importance))
        return inputs * self._switches(self._learned(), passed)

    def penalty(self):
        """Return the term that draws scores down, a tensor `()`, for a loss.

        With n weights in a block, `n * mean(sigmoid(importance))`, the mean being over blocks, and
        0 once the mask is fixed. NNCF's loss is half its mean over the layers, times a factor.

        Gradient for each of N scores: `lr_multiplier * g * n / N * sigmoid'(importance)`.
        """
        scores = ops.sigmoid(ops.convert_to_tensor(self.importance))
        value = math.prod(self.block) * ops.mean(scores)
        return ops.where(ops.convert_to_tensor(self.frozen), 0.0, self._through(value, value))

    def get_config(self):
        return super().get_config() | {
            "mode": self.mode,
            "sparse_factors": self.sparse_factors,
            "axis": self.axis,
        }

    def _learned(self):
        importance = ops.stop_gradient(ops.convert_to_tensor(self.importance))
        return self._repeated(importance > self._bounded_threshold(importance))

    def _bounded_threshold(self, importance):
        """Return `min(threshold, q)`; q is looked for only where it can be the lower one."""
        threshold = ops.convert_to_tensor(self.threshold)
        scores = ops.reshape(importance, (-1,))
        count, repeats = scores.shape[0], math.prod(self.block)
        place = self.percentile * (count * repeats - 1)  # in the row of all repeated scores
        low, high = (int(i) // repeats for i in (math.floor(place), math.ceil(place)))

        def bounded():
            top = ops.top_k(scores, count - low)[0]  # falling, down to the lower neighbour of q
            lower, upper = top[count - low - 1], top[count - high - 1]
            return ops.minimum(threshold, lower + (place % 1) * (upper - lower))

        above = ops.sum(ops.cast(scores > threshold, "int32"))
        return ops.cond(above >= count - low, lambda: threshold, bounded)

    def _repeated(self, scores):
        """Return a tensor shaped as the weight, each score repeated over its block."""
        if max(self.block, default=1) == 1:
            return scores
        counts = tuple(scores.shape)
        pairs = [size for pair in zip(counts, self.block, strict=True) for size in pair]
        split = [size for count in counts for size in (count, 1)]
        scores = ops.broadcast_to(ops.reshape(scores, split), pairs)
        return ops.reshape(scores, tuple(self.mask.shape))

    def _score_shape(self, shape):
        """Return the shape of the importance."""
        return tuple(size // factor for size, factor in zip(shape, self.block, strict=True))

    def _block_of(self, shape):
        """Return the size of a block along every axis."""
        if self.mode == "per_dim":
            if self.axis < -len(shape):
                raise ValueError(
                    f"Expected an axis of the weight. Received: axis={self.axis}, "
                    f"weight of shape {shape}"
                )
            return tuple(1 if i - len(shape) == self.axis else n for i, n in enumerate(shape))
        factors = self.sparse_factors or ()
        block = (1,) * (len(shape) - len(factors)) + factors
        if len(factors) > len(shape) or any(n % k for n, k in zip(shape, block, strict=True)):
            raise ValueError(
                "Expected blocks that divide the weight. "
                f"Received: sparse_factors={self.sparse_factors}, weight of shape {shape}"
            )
        return block


def _known(shape):
    """Return a shape with 1, one value for all positions, along axes of unknown size."""
    return tuple(1 if size is None else size for size in shape)


def _checked_structure(mode, sparse_factors, axis):
    if mode not in MODES:
        raise ValueError(f"Expected one of {MODES}. Received: mode={mode!r}")
    if (sparse_factors is not None) != (mode == "block"):
        raise ValueError(
            "Expected `sparse_factors` with the mode 'block', and only then. "
            f"Received: mode={mode!r}, sparse_factors={sparse_factors!r}"
        )
    if (axis is not None) != (mode == "per_dim"):
        raise ValueError(
            "Expected `axis` with the mode 'per_dim', and only then. "
            f"Received: mode={mode!r}, axis={axis!r}"
        )
    if axis is not None and (not _is_whole(axis) or axis >= 0):
        raise ValueError(f"Expected an axis counted from the end. Received: axis={axis!r}")
    if sparse_factors is None:
        return mode, None, axis
    is_sequence = isinstance(sparse_factors, (tuple, list)) and bool(sparse_factors)
    if not is_sequence or not all(_is_whole(k) and k > 0 for k in sparse_factors):
        raise ValueError(
            "Expected a tuple of positive whole numbers, such as (32, 32). "
            f"Received: sparse_factors={sparse_factors!r}"
        )
    return mode, tuple(sparse_factors), axis


def _is_whole(value):
    return isinstance(value, int) and not isinstance(value, bool)
