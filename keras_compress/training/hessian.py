"""How sharply the training loss bends along each weight: Hutchinson's traces of its Hessian.

What is differentiated is `_Loss`: a function of the weights' values, which leaves the model alone.
"""

import dataclasses
import functools
import inspect
import logging
import math

import keras
import numpy as np
from keras import ops

from keras_compress.compressed_layer import PACKAGE
from keras_compress.graph.trace import trace
from keras_compress.training.compiled import has_loss

FEWEST_DRAWS = 10  # before an early stop
STEADY_DRAWS = 3  # in a row that have to change the total by less than the tolerance
UNDIFFERENTIABLE = (LookupError, NotImplementedError, RuntimeError, TypeError, ValueError)

logger = logging.getLogger(PACKAGE)


@dataclasses.dataclass(frozen=True)
class Trace:
    """The average Hessian trace of one weight tensor, estimated.

    Attributes:
        value: mean of the Hessian's diagonal over the tensor's parameters.
        error: standard error of `value` over the draws; infinite after a single one.
        draws: number of random vectors.
        exact: whether the loss was differentiated twice; if not, gradients were subtracted.
    """

    value: float
    error: float
    draws: int
    exact: bool


def hessian_traces(model, variables, batches, iterations=200, tolerance=1e-4, seed=0, report=None):
    """Estimate the average Hessian trace of the loss for each weight tensor, by Hutchinson.

    With v of independent elements -1 or 1, and H_l the block of a weight of n_l parameters:

        trace(H_l) / n_l = E[v_l . (H v)_l] / n_l

    One product `H v` per draw serves all weights: other blocks add what has the mean zero. The
    draws stop once, after 10 at least, three in a row (one may be luck) have changed the sum of
    the estimates by `|total - previous| / (|previous| + 1e-6) < tolerance`.

    The loss is that of `model.compute_loss` in inference mode, averaged over the batches by their
    samples, with the regularizers that Keras adds: L2(c) adds 2c, unless the layer is frozen.
    Variables of the model, its metrics and its optimizer are never written. Where an operation
    has no second derivative, gradients are subtracted, with a warning.

    Args:
        model: a built Keras model, compiled with a loss.
        variables: dict `{key: variable of the model}`, any shapes, of frozen layers too.
        batches: list of `(inputs, targets, sample weights)` as of `data.labelled_batches`.
        iterations: largest number of draws.
        tolerance: relative change of the total below which the draws stop; 0: never.
        seed: seed of the random vectors, which are the same on every backend.
        report: function `(number of draws, total)`, called after each.

    Returns:
        A dict `{key: Trace}`.

    Raises:
        ValueError: no loss, batches, iterations or variables; one that is not a float variable of
            the model; a loss or a product that is not finite.

    Example:
    >>> batches = labelled_batches((x, y), model.inputs, limit=4)
    >>> hessian_traces(model, {layer.name: layer.kernel for layer in convolutions}, batches)
    {'stem': Trace(value=0.21, error=0.004, draws=87, exact=True), ...}

    Reference:
        Dong et al., HAWQ-V2, arXiv:1911.03852, section 3.
    """
    _check_arguments(model, variables, batches, iterations)
    weights = {id(variable): variable for variable in variables.values()}
    curvature = _Curvature(_Loss(model, list(weights.values())), batches)
    draws = _draw(curvature, np.random.default_rng(seed), iterations, tolerance, report)
    traces = [Trace(*_mean(column), len(draws), curvature.exact) for column in np.transpose(draws)]
    found = dict(zip(weights, traces, strict=True))
    return {key: found[id(variable)] for key, variable in variables.items()}


def _draw(curvature, random, iterations, tolerance, report):
    """Return `v_l . (H v)_l / n_l` for every draw and weight."""
    weights = curvature.loss.weights
    draws, totals = [], []
    while len(draws) < iterations and not _is_steady(totals, tolerance):
        draws.append(curvature([_signs(random, weight.shape) for weight in weights]))
        _require_finite(draws, weights)
        totals.append(float(np.mean(draws, axis=0).sum()))
        if report is not None:
            report(len(draws), totals[-1])
    return draws


class _Loss:
    """Function `(values of weights, of all other variables, batch) -> loss`, without effects."""

    def __init__(self, model, weights):
        self.model = model
        self.weights = weights
        chosen = {id(weight) for weight in weights}
        self.others = [v for v in model.variables if id(v) not in chosen]
        self.structure = getattr(model, "input", None)
        if self.structure is None:  # a subclassed model
            self.structure = trace(model).input_structure
        arguments = inspect.signature(model.compute_loss).parameters
        self.mode = {"training": False} if "training" in arguments else {}

    def __call__(self, values, others, batch):
        inputs, targets, sample_weights = batch
        x = keras.tree.pack_sequence_as(self.structure, list(inputs))
        mapping = zip([*self.weights, *self.others], [*values, *others], strict=True)
        with keras.StatelessScope(state_mapping=list(mapping), collect_losses=True):
            predictions = self.model(x, training=False)
            loss = self.model.compute_loss(x, targets, predictions, sample_weights, **self.mode)
        return ops.cast(loss, "float32")


class _Curvature:
    """Function `vectors -> [v_l . (H v)_l / n_l]`, in NumPy, averaged over the batches."""

    def __init__(self, loss, batches):
        self.loss = loss
        self.batches = keras.tree.map_structure(
            lambda leaf: None if leaf is None else ops.convert_to_tensor(leaf), list(batches)
        )
        self.state = [_values(loss.weights), _values(loss.others)]
        self._require_finite_losses()
        samples = np.array([len(inputs[0]) for inputs, _, _ in self.batches])
        self.shares = samples / samples.sum()
        self.sizes = [math.prod(weight.shape) for weight in loss.weights]
        self.step = _difference_step(loss.model, self.state[0])
        self.exact = True
        eager = loss.model.run_eagerly
        self.by_derivatives = _compiled(self._by_derivatives, eager)
        self.by_differences = _compiled(self._by_differences, eager)

    def __call__(self, vectors):
        vectors = [ops.convert_to_tensor(vector) for vector in vectors]
        if self.exact:
            try:
                return self._average(self.by_derivatives, vectors)
            except UNDIFFERENTIABLE as error:
                self.exact = False
                logger.warning(
                    "Hessian traces: the loss cannot be differentiated twice; gradients at "
                    f"w - {self.step:.1e} v and w + {self.step:.1e} v are subtracted instead "
                    f"({type(error).__name__}: {error})"
                )
        return self._average(self.by_differences, vectors)

    def _average(self, function, vectors):
        dots = [ops.convert_to_numpy(function(*self.state, vectors, b)) for b in self.batches]
        return self.shares @ np.array(dots, "float64") / self.sizes

    def _by_derivatives(self, values, others, vectors, batch):
        loss = functools.partial(self.loss, others=others, batch=batch)
        return _dots(_hessian_product(loss, values, vectors), vectors)

    def _by_differences(self, values, others, vectors, batch):
        """H v ~ (g(w + h v) - g(w - h v)) / 2h."""
        loss = functools.partial(self.loss, others=others, batch=batch)
        steps = [ops.cast(self.step * v, w.dtype) for v, w in zip(vectors, values, strict=True)]
        ahead = _gradients(loss, [w + step for w, step in zip(values, steps, strict=True)])
        behind = _gradients(loss, [w - step for w, step in zip(values, steps, strict=True)])
        return (_dots(ahead, vectors) - _dots(behind, vectors)) / (2 * self.step)

    def _require_finite_losses(self):
        """Call the loss on each batch, outside of compiled code: the first call builds it."""
        for index, batch in enumerate(self.batches):
            loss = float(ops.convert_to_numpy(self.loss(*self.state, batch)))
            if not math.isfinite(loss):
                raise ValueError(
                    f"Expected a finite loss on every batch. Received: {loss} on batch {index}"
                )


def _hessian_product(function, values, vectors):
    """Return H v: the gradient of `g . v`; on JAX the derivative of g along v, which is faster."""
    if keras.backend.backend() == "jax":
        import jax

        tangents = [ops.cast(v, value.dtype) for v, value in zip(vectors, values, strict=True)]
        return jax.jvp(jax.grad(function), (values,), (tangents,))[1]
    return _gradients(lambda at: ops.sum(_dots(_gradients(function, at), vectors)), values)


def _gradients(function, values):
    """Return the gradients of a scalar function of a list of tensors: zero where none matters."""
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(values)
            result = function(values)
        gradients = tape.gradient(result, values, unconnected_gradients="zero")
        return [tf.convert_to_tensor(gradient) for gradient in gradients]
    if backend == "jax":
        import jax

        return jax.grad(function)(values)
    import torch

    result = function([value.requires_grad_() for value in values])
    if not result.requires_grad:
        return [torch.zeros_like(value) for value in values]
    options = {"create_graph": True, "allow_unused": True, "materialize_grads": True}
    return torch.autograd.grad(result, values, **options)


def _compiled(function, eager):
    """Compile a function, once per shape of its arguments, where the backend does that."""
    backend = keras.backend.backend()
    if eager or backend == "torch":
        return function
    if backend == "jax":
        import jax

        return jax.jit(function)
    import tensorflow as tf

    return tf.function(function, autograph=False)


def _dots(tensors, vectors):
    """Return a tensor of `sum(tensor * vector)` for each pair, computed in float32."""
    pairs = zip(tensors, vectors, strict=True)
    return ops.stack([ops.sum(ops.cast(tensor, "float32") * v) for tensor, v in pairs])


def _values(variables):
    """Return the values as tensors of their own: gradients do not reach the variables."""
    return [ops.stop_gradient(ops.convert_to_tensor(variable)) for variable in variables]


def _signs(random, shape):
    """Return a Rademacher vector: -1 or 1, in float32."""
    return (2 * random.integers(0, 2, shape, dtype="int8") - 1).astype("float32")


def _difference_step(model, values):
    """Return h, at which the errors by rounding (eps / h) and by curvature (h^2) are alike."""
    eps = 1e-3 if "16" in model.compute_dtype else np.finfo("float32").eps
    squares = sum(float(ops.sum(ops.square(ops.cast(value, "float32")))) for value in values)
    size = math.sqrt(squares / sum(math.prod(value.shape) for value in values))
    return float(eps ** (1 / 3) * (size or 1.0))


def _mean(samples):
    """Return the mean and its standard error."""
    error = np.std(samples, ddof=1) / math.sqrt(len(samples)) if len(samples) > 1 else math.inf
    return float(np.mean(samples)), float(error)


def _is_steady(totals, tolerance):
    last = np.array(totals[-STEADY_DRAWS - 1 :])
    changes = np.abs(np.diff(last)) / (np.abs(last[:-1]) + 1e-6)
    return len(totals) >= FEWEST_DRAWS and bool(np.all(changes < tolerance))


def _require_finite(draws, weights):
    bad = [weights[i].path for i in np.flatnonzero(~np.isfinite(draws[-1]))]
    if bad:
        raise ValueError(
            "Expected finite second derivatives of the loss. Received: NaN or infinity in draw "
            f"{len(draws)} for {bad}"
        )


def _check_arguments(model, variables, batches, iterations):
    if not has_loss(model):
        raise ValueError(
            "Expected a model that was compiled with a loss: `model.compile(optimizer, loss)`. "
            f"Received: model '{model.name}' without."
        )
    counts = {"batches": len(batches), "variables": len(variables), "iterations": iterations}
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"Expected one at least of `{name}`. Received: {count}")
    known = {id(variable) for variable in model.variables}
    for key, variable in variables.items():
        if id(variable) not in known or "float" not in variable.dtype:
            raise ValueError(
                f"Expected float variables of model '{model.name}'. Received: "
                f"'{getattr(variable, 'path', variable)}' for key {key!r}"
            )
