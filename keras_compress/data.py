"""Calibration data: whatever `model.fit` accepts becomes batches of model inputs."""

import itertools

import keras
import numpy as np


def input_batches(data, inputs, samples, batch_size=32):
    """Yield the model's inputs, batch by batch, until `samples` samples have been given.

    Args:
        data: `tf.data.Dataset`, `keras.utils.PyDataset`, generator or other iterable of batches,
            or NumPy arrays (a structure of them). Batches are inputs, or tuples
            `(inputs, targets[, sample_weights])`.
        inputs: the model's inputs in order, each with a `name` and a `shape` (batch axis first).
        samples: number of samples wanted; the last batch is not cut.
        batch_size: batch size for arrays.

    Yields:
        A flat list of NumPy arrays, one per model input, batch axis first.

    Raises:
        ValueError: no data, a shape that does not fit, or values that are not finite.
    """
    seen = 0
    for index, batch in enumerate(_batches(data, batch_size)):
        arrays = _inputs_of(batch, inputs)
        _check(arrays, inputs, index)
        if len(arrays[0]) == 0:  # a last batch may be, and few operations compute with none
            continue
        yield arrays
        seen += arrays[0].shape[0]
        if seen >= samples:
            return
    if seen == 0:
        raise ValueError(
            f"Expected calibration data with at least one sample. Received: data={data!r}, "
            "which gave none."
        )


def labelled_batches(data, inputs, limit, batch_size=32, samples=None):
    """Return up to `limit` batches `(inputs, targets, sample weights)`.

    Args:
        data: as for `input_batches`; every batch is `(inputs, targets[, sample_weights])`.
        inputs: the model's inputs, as for `input_batches`.
        limit: largest number of batches.
        batch_size: batch size for arrays.
        samples: None, or number of samples after which no further batch is read.

    Returns:
        A list of triples: a flat list of NumPy arrays, one per model input; the targets in the
        structure they came in, of NumPy arrays; the sample weights likewise, or None.

    Raises:
        ValueError: no data, no targets, or inputs that `input_batches` refuses.
    """
    batches, seen = [], 0
    for index, batch in enumerate(itertools.islice(_batches(data, batch_size), limit)):
        if not _has_targets(batch, len(inputs)):
            raise ValueError(
                "Expected labelled data: batches `(inputs, targets)` or `(inputs, targets, "
                f"sample_weights)`. Received: batch {index} is a {type(batch).__name__} without "
                "targets"
            )
        arrays = _inputs_of(batch, inputs)
        _check(arrays, inputs, index)
        if len(arrays[0]) == 0:
            continue
        _, targets, weights = keras.utils.unpack_x_y_sample_weight(batch)
        targets, weights = keras.tree.map_structure(
            lambda leaf: None if leaf is None else keras.ops.convert_to_numpy(leaf),
            (targets, weights),
        )
        batches.append((arrays, targets, weights))
        seen += len(arrays[0])
        if samples is not None and seen >= samples:
            break
    if not batches:
        raise ValueError(
            f"Expected labelled data with at least one batch. Received: data={data!r}, which gave "
            "none."
        )
    return batches


def _has_targets(batch, expected):
    labelled = isinstance(batch, tuple) and len(batch) in (2, 3) and batch[1] is not None
    return labelled and not _is_inputs_alone(batch, expected)


def _batches(data, batch_size):
    if isinstance(data, keras.utils.PyDataset):
        endless = data.num_batches is None
        return (
            data[index] for index in (itertools.count() if endless else range(data.num_batches))
        )
    if isinstance(data, list) and any(isinstance(batch, (tuple, dict)) for batch in data):
        return iter(data)
    arrays = keras.tree.flatten(data)
    if all(hasattr(leaf, "shape") and hasattr(leaf, "__getitem__") for leaf in arrays) and arrays:
        return _slices(data, arrays, batch_size)
    if hasattr(data, "__iter__") and not isinstance(data, (str, bytes)):
        return iter(data)
    raise ValueError(
        "Expected calibration data as a tf.data.Dataset, keras.utils.PyDataset, NumPy arrays or an "
        f"iterable of batches. Received: data={data!r} (of type {type(data).__name__})"
    )


def _slices(data, arrays, batch_size):
    """Cut whole arrays into batches along their first axis."""
    length = len(arrays[0])
    for start in range(0, length, batch_size):
        stop = start + batch_size
        yield keras.tree.map_structure(lambda leaf, a=start, b=stop: leaf[a:b], data)


def _inputs_of(batch, inputs):
    """Drop targets and sample weights; return one array per model input in the model's order."""
    expected = len(inputs)
    if isinstance(batch, tuple) and not _is_inputs_alone(batch, expected):
        batch = batch[0]
    if isinstance(batch, dict):
        names = [tensor.name for tensor in inputs]
        missing = sorted(set(names) - set(batch))
        if missing:
            raise ValueError(
                f"Expected calibration batches with the inputs {names}. "
                f"Received: keys {sorted(batch)}; missing {missing}."
            )
        batch = [batch[name] for name in names]
    leaves = [keras.ops.convert_to_numpy(leaf) for leaf in keras.tree.flatten(batch)]
    if len(leaves) != expected:
        raise ValueError(
            f"Expected calibration batches with {expected} input(s) "
            f"{[tensor.name for tensor in inputs]}. Received: {len(leaves)} array(s)."
        )
    return leaves


def _is_inputs_alone(batch, expected):
    """Whether a tuple holds one array per input of a model with several, and no targets."""
    return expected > 1 and len(batch) == expected and len(keras.tree.flatten(batch[0])) == 1


def _check(arrays, inputs, index):
    lengths = sorted({len(array) for array in arrays if array.ndim})
    if len(lengths) > 1:
        raise ValueError(
            f"Calibration batch {index} does not fit together. Expected one number of samples in "
            f"all inputs. Received: {lengths}."
        )
    for array, tensor in zip(arrays, inputs, strict=True):
        fits = len(array.shape) == len(tensor.shape) and all(
            want is None or want == got
            for want, got in zip(tensor.shape[1:], array.shape[1:], strict=True)
        )
        if not fits:
            raise ValueError(
                f"Calibration batch {index} does not fit the model's input '{tensor.name}'. "
                f"Expected shape {tuple(tensor.shape)}. Received: {array.shape}."
            )
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ValueError(
                f"Calibration batch {index} holds NaN or infinite values for the model's input "
                f"'{tensor.name}'. Expected finite numbers."
            )
