"""A metric of a model on data that are read once, for all models that are compared by it."""

import math

import keras

from keras_compress.data import labelled_batches
from keras_compress.metrics import lower_is_better
from keras_compress.training.compiled import compile_arguments

# What `compile` turns into a metric that fits the targets.
RESOLVED_BY_COMPILE = ("accuracy", "acc", "crossentropy", "ce")


class Judge:
    """Function `model -> float`: a metric of a model.

    Args:
        metric: name of a metric as `compile(metrics=[...])` takes it; `"loss"`; a
            `keras.metrics.Metric`; or a function `f(keras_model) -> float`.
        model: the user's model, which says how others are compiled; it must have a loss for
            `"loss"`, and one output for a metric.
        graph: its `Graph`.
        data: labelled samples; not read where the metric is a function.
        samples: None, or number of samples after which no further batch is read.
        mode: `"max"`, `"min"` or `"auto"`, see `lower_is_better`.

    Attributes:
        name: name of the metric.

    Raises:
        TypeError: `metric` is none of these.
        ValueError: Keras has no metric of that name; the model lacks what is needed; `data` have no
            labels or no end.
    """

    def __init__(self, metric, model, graph, data, samples=None, mode="auto"):
        self.metric, self.model = metric, model
        self.name = _name(metric)
        self._lower = lower_is_better(self.name, mode)
        self._batches = None
        if isinstance(metric, (str, keras.metrics.Metric)):
            self._check_outputs(graph)
            self._arguments()
            _require_end(data, samples)
            self._batches = Batches(labelled_batches(data, graph.inputs, None, samples=samples))

    def __call__(self, model):
        if self._batches is None:
            return self._number(self.metric(model))
        if not model.compiled:
            model.compile(**self._arguments())
        self._batches.structure = model.input
        results = model.evaluate(self._batches, verbose=0, return_dict=True)
        loss = results.pop("loss")
        if self.name == "loss":
            return float(loss)
        if len(results) != 1:
            raise ValueError(
                f"Expected a metric with one value. Received: metric={self.name!r}, which gave "
                f"{sorted(results)}. Give a function `f(keras_model) -> float`."
            )
        return self._number(*results.values())

    def drop(self, value, baseline):
        """Return how much worse a value is than another, whichever way is better.

        Infinite where `value` is not finite.
        """
        if not math.isfinite(value):
            return math.inf
        return value - baseline if self._lower else baseline - value

    def _check_outputs(self, graph):
        outputs = len(graph.outputs)
        if outputs != 1 and self.name != "loss":
            raise ValueError(
                f"Expected a model with one output for a metric. Received: metric={self.name!r}, "
                f"model '{self.model.name}' with {outputs} outputs. Give a function "
                "`f(keras_model) -> float`, or 'loss'."
            )

    def _arguments(self):
        """Return the arguments of `compile`."""
        if self.name == "loss":
            otherwise = "Name another metric, or give a function."
            return compile_arguments(self.model, "`metric` 'loss'", otherwise)
        arguments = {"loss": _nothing, "metrics": [self.metric]}
        if getattr(self.model, "compiled", False):
            arguments["run_eagerly"] = self.model.run_eagerly
            arguments["jit_compile"] = self.model.jit_compile
        return arguments

    def _number(self, value):
        try:
            return float(value)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"Expected metric {self.name!r} to give a number. Received: {value!r}"
            ) from error


class Batches(keras.utils.PyDataset):
    """Batches in memory, as `evaluate` reads them.

    Args:
        batches: what `labelled_batches` returns.

    Attributes:
        structure: structure of the model's input, in which inputs are given.
    """

    def __init__(self, batches):
        super().__init__()
        self.batches = batches
        self.structure = None

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        inputs, targets, weights = self.batches[index]
        packed = keras.tree.pack_sequence_as(self.structure, inputs)
        batch = (packed, targets) if weights is None else (packed, targets, weights)
        return keras.tree.lists_to_tuples(batch)  # TensorFlow takes a list for one array


class Replay:
    """Batches of an iterator that can be read again: each is kept once it was needed.

    Example:

    >>> batches = Replay(iter("abc"))
    >>> next(iter(batches)), list(batches), list(batches)
    ('a', ['a', 'b', 'c'], ['a', 'b', 'c'])
    """

    def __init__(self, batches):
        self._waiting = iter(batches)
        self._seen = []

    def __iter__(self):
        index = 0
        while True:
            if index == len(self._seen):
                try:
                    self._seen.append(next(self._waiting))
                except StopIteration:
                    return
            yield self._seen[index]
            index += 1


def repeatable(data):
    """Return data that give the same batches whenever they are read.

    Arrays, lists of batches and `keras.utils.PyDataset` do so by themselves; generators end, and a
    `tf.data.Dataset` may be shuffled anew.
    """
    is_whole = hasattr(data, "shape") or isinstance(data, (list, tuple, dict, str, bytes))
    if is_whole or isinstance(data, keras.utils.PyDataset) or not hasattr(data, "__iter__"):
        return data
    return Replay(data)


def _require_end(data, samples):
    """Raise where all of data are wanted that say that they never end."""
    endless = isinstance(data, keras.utils.PyDataset) and data.num_batches is None
    count = getattr(data, "cardinality", None)  # of a `tf.data.Dataset`: -1 without end
    if samples is None and (endless or (callable(count) and int(count()) == -1)):
        raise ValueError(
            "Expected `samples`, how many to judge with, for data without end. Received: "
            f"samples=None, data={data!r}"
        )


def _name(metric):
    """Return the name of a metric, once it is known to be one."""
    if isinstance(metric, keras.metrics.Metric):
        return metric.name
    if not isinstance(metric, str):
        if callable(metric) and not isinstance(metric, type):
            return getattr(metric, "__name__", type(metric).__name__)
        raise TypeError(
            "Expected the name of a metric, a `keras.metrics.Metric` or a function "
            f"`f(keras_model) -> float`. Received: {metric=} (of type {type(metric).__name__})"
        )
    if metric not in (*RESOLVED_BY_COMPILE, "loss"):
        try:
            keras.metrics.get(metric)
        except ValueError as error:
            raise ValueError(
                "Expected the name of a metric of Keras, such as 'accuracy', or 'loss'. "
                f"Received: {metric=}. For one of your own give a `keras.metrics.Metric`."
            ) from error
    return metric


def _nothing(targets, outputs):
    """A loss of zero per sample: Keras asks for one where a model is judged by a metric."""
    flat = keras.ops.reshape(outputs, (keras.ops.shape(outputs)[0], -1))
    return keras.ops.zeros_like(flat[:, 0])
