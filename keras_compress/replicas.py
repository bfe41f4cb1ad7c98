"""What the replicas of one model must share, where they are trained on several devices at once.

Under `tf.distribute` each replica computes its part of the batch: losses are shares, sums are made
over all replicas, and workers see each other's samples. Under `keras.distribution` the computation
is that of one device, on arrays that are spread: states of a transform lie as its weight does.
`keras_compress.torch` does the former for `DistributedDataParallel`.
"""

import contextlib

import keras
import numpy as np


def _strategy():
    """Return the `tf.distribute` strategy that is in scope, None where there is none."""
    if keras.backend.backend() != "tensorflow":
        return None
    import tensorflow as tf

    return tf.distribute.get_strategy() if tf.distribute.has_strategy() else None


def scope_of(model):
    """Return the context in which variables of a model like this one are made.

    Under `tf.distribute` that is the strategy's scope that the model was made in, which `fit` does
    not enter. Elsewhere it is the one that holds anyway.
    """
    strategy = getattr(model, "distribute_strategy", None)
    if strategy is None or _strategy() is not None:
        return contextlib.nullcontext()
    return strategy.scope()


def has_several_replicas(model):
    """Whether a model is trained by replicas of `tf.distribute`."""
    return getattr(getattr(model, "distribute_strategy", None), "num_replicas_in_sync", 1) > 1


def is_one_of_many_workers():
    """Whether processes with variables of their own train together, by the strategy in scope."""
    strategy = _strategy()
    if strategy is None:
        return False
    import tensorflow as tf

    return isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)


def predict_here(model, inputs):
    """Return the outputs of a model, NumPy arrays, without any other worker having part in it."""
    with scope_of(model):
        alone = not is_one_of_many_workers()
    if alone:
        return model.predict(inputs, verbose=0)
    return keras.tree.map_structure(keras.ops.convert_to_numpy, model(inputs, training=False))


def share_of(loss):
    """Return a replica's share of a loss that all replicas compute: their gradients are added."""
    strategy = _strategy()
    return loss if strategy is None else loss / strategy.num_replicas_in_sync


def total(values):
    """Return the sum of a tensor over all replicas; outside of them, the tensor."""
    context = _replica_context()
    if context is None:
        return values
    import tensorflow as tf

    return context.all_reduce(tf.distribute.ReduceOp.SUM, values)


def observed_by_worker(batch):
    """Return what this worker's observers shall see of a replica's batch, a tensor, or None.

    The replicas of one process share their observers, which so see the whole batch. Those of
    several processes do not: each process is shown the samples of all, once.
    """
    context = _replica_context()
    if context is None or not is_one_of_many_workers():
        return batch
    import tensorflow as tf

    gathered = context.all_gather(batch, axis=0)
    here = len(context.strategy.extended.worker_devices)
    number = tf.get_static_value(context.replica_id_in_sync_group)
    return gathered if number % here == 0 else None


def of_all_workers(batches):
    """Return batches of samples, each joined from one of every worker.

    Args:
        batches: list of flat lists of arrays, batch axis first. Workers that have more than others
            leave the rest out.

    Returns:
        The same, equal on every worker. With a single worker, what was given; so too where all
        workers give the same samples, which count once.
    """
    if not is_one_of_many_workers():
        return batches
    count = int(_gathered([np.array([len(batches)])])[0].min())
    return [_joined(arrays) for arrays in batches[:count]]


def _joined(arrays):
    found = _gathered(arrays)
    workers = _strategy().num_replicas_in_sync
    repeated = (np.concatenate([array] * workers) for array in arrays)
    return arrays if all(map(np.array_equal, found, repeated)) else found


def take_weights_of_first_worker(model):
    """Give the variables of a model the values that they have on the first worker."""
    if not is_one_of_many_workers():
        return
    for variable in model.variables:
        value = keras.ops.convert_to_numpy(variable)
        if value.size:
            variable.assign(_gathered([value[None]])[0][0])


def _gathered(arrays):
    """Return arrays joined along their first axis over all workers, in the workers' order."""
    import tensorflow as tf

    strategy = _strategy()
    sent = [array.astype(_sent_as(array.dtype)) for array in arrays]

    def gather():
        context = tf.distribute.get_replica_context()
        return [context.all_gather(tf.convert_to_tensor(array), axis=0) for array in sent]

    found = strategy.run(tf.function(gather))
    found = [strategy.experimental_local_results(each)[0].numpy() for each in found]
    return [each.astype(array.dtype) for each, array in zip(found, arrays, strict=True)]


def _sent_as(dtype):
    """Return a type that workers can send and that holds every value of another."""
    if dtype.kind in "bui":
        return "int64"
    return dtype if dtype.kind == "f" else "float32"  # NumPy knows no kind of bfloat16


def _replica_context():
    """Return the context of the replica that is computing; None outside, or where it is alone."""
    strategy = _strategy()
    if strategy is None or strategy.num_replicas_in_sync == 1:
        return None
    import tensorflow as tf

    return tf.distribute.get_replica_context()


class _Layouts(keras.distribution.ModelParallel):
    """A distribution that a function lays variables out for, and else is another.

    Args:
        distribution: the other one.
        layout_of: function of a variable that is being made; gives its `TensorLayout`, or None
            where the other distribution decides.
    """

    def __init__(self, distribution, layout_of):
        super().__init__(
            layout_map=keras.distribution.LayoutMap(distribution.device_mesh),
            batch_dim_name=distribution.batch_dim_name,
            auto_shard_dataset=distribution.auto_shard_dataset,
        )
        self._distribution = distribution
        self._layout_of = layout_of

    def get_data_layout(self, data_shape):
        return self._distribution.get_data_layout(data_shape)

    def get_tensor_layout(self, path):
        return self._distribution.get_tensor_layout(path)

    def get_variable_layout(self, variable):
        own = self._distribution.get_variable_layout(variable)
        named = any(own.axes) and len(own.axes) == len(variable.shape)
        return own if named else self._layout_of(variable) or _replicated(own, variable)


def _replicated(layout, variable):
    """Return a layout with all of a variable on every device."""
    axes = [None] * len(variable.shape)
    return keras.distribution.TensorLayout(axes, layout.device_mesh)


def laid_out_like(weight):
    """Return the context to make states of a transform in: they lie as the weight does.

    A state of as many axes as the weight is split along those where it is as large. A layout that
    the user gives for the state's own path comes first.

    Args:
        weight: the variable that is transformed.
    """
    distribution = keras.distribution.distribution()
    if distribution is None:
        return contextlib.nullcontext()
    layout = distribution.get_variable_layout(weight)

    def layout_of(state):
        if len(state.shape) != len(weight.shape):
            return None
        sizes = zip(layout.axes, weight.shape, state.shape, strict=True)
        axes = [axis if size == other else None for axis, size, other in sizes]
        return keras.distribution.TensorLayout(axes, layout.device_mesh)

    return _Layouts(distribution, layout_of).scope()


def laid_out_by_path(sources):
    """Return the context to make a model in whose weights lie as those of another model.

    Args:
        sources: {path that a variable will have: the variable of the other model}.
    """
    distribution = keras.distribution.distribution()
    if distribution is None:
        return contextlib.nullcontext()

    def layout_of(variable):
        source = sources.get(variable.path)
        if source is None or tuple(source.shape) != tuple(variable.shape):
            return None
        return distribution.get_variable_layout(source)

    return _Layouts(distribution, layout_of).scope()
