"""The way back: trained weights in the user's own class structure.

`trace` notes, in a `WeightMap`, which of the user's weights each weight of the flat model is.
`restore` puts the flat model's values back where they came from, in a copy of the user's model.
"""

import contextlib
import dataclasses
import itertools
import pathlib
import tempfile
import types

import keras

from keras_compress.compressed_layer import CompressedLayer
from keras_compress.graph.rebuild import finalize_state
from keras_compress.graph.walk import all_layers, set_path

LAMBDA = "<lambda>"  # what Python calls functions without a name


@dataclasses.dataclass(frozen=True)
class WeightMap:
    """Which weight of the user's model each weight of a flat model is.

    Paths are not unique in every model, so a weight is known by its position in `model.weights`.
    Invariant, as long as nothing was trained:
    `flat.get_layer(name).weights[i] == model.weights[layers[name][i]]`, where the weights of a
    compressed layer are its `plain_weights`.

    Attributes:
        paths: the path of each weight of the user's model, in the order of `model.weights`.
        layers: {name of a flat layer: list with the position of each of its weights}. A position
            is None where the user's model does not track the weight.
    """

    paths: list
    layers: dict

    @classmethod
    def of(cls, model, nodes, originals):
        """Return the map from `model` to the layers of traced nodes.

        Args:
            model: the user's model.
            nodes: the nodes of its `Graph`.
            originals: {id of a variable that tracing made: the user's variable it is a copy of}.
        """
        positions = {id(variable): i for i, variable in enumerate(model.weights)}

        def position(variable):
            return positions.get(id(originals.get(id(variable), variable)))

        layers = {
            node.name: [position(variable) for variable in node.op.weights]
            for node in nodes
            if isinstance(node.op, keras.layers.Layer) and node.op.weights
        }
        return cls([variable.path for variable in model.weights], layers)

    def to_dict(self):
        """Return the map as JSON-able data: the arguments of `WeightMap`."""
        return dataclasses.asdict(self)


def restore(flat, weight_map, like):
    """Return a copy of the user's model `like` that holds the effective weights of a flat one.

    Weights that the flat model does not hold, because no output depends on them, stay as they are
    in `like`.

    Args:
        flat: a model rebuilt from a `Graph` of the user's model, compressed or not.
        weight_map: the `WeightMap` of that graph.
        like: the user's model, or one of the same structure. It is left untouched.

    Raises:
        ValueError: a weight does not fit, or `like` cannot be copied.
    """
    _require_fit(flat, weight_map, like)
    values = _trained_values(flat, weight_map)
    twin = copy_model(like)
    weights = twin.weights
    for position, value in values.items():
        weights[position].assign(value)
    finalize_state(twin)
    return twin


def copy_model(model):
    """Return a copy of any built model: same class, same weights and paths; uncompiled.

    Raises:
        ValueError: the model does not survive saving and loading.
    """
    layers = [model, *all_layers(model)]
    classes = {type(x) for x in layers if type(x).__module__.partition(".")[0] != "keras"}
    scope = {keras.saving.get_registered_name(cls): cls for cls in classes}
    try:
        with (
            tempfile.TemporaryDirectory() as folder,
            _lambdas_named(layers) as functions,
            keras.saving.custom_object_scope(scope | functions),
        ):
            path = pathlib.Path(folder, "model.keras")
            keras.saving.save_model(model, path)
            twin = keras.saving.load_model(path, compile=False, safe_mode=True)
    except Exception as error:  # whatever a user's class may raise in there
        raise ValueError(_not_copied(model, f"{type(error).__name__}: {error}")) from error
    for old, new in itertools.zip_longest(model.weights, twin.weights):
        if old is None or new is None or not _equal(*map(keras.ops.convert_to_numpy, (old, new))):
            path = (new if old is None else old).path
            raise ValueError(_not_copied(model, f"a copy with another weight '{path}'"))
        # Keras leaves the names of outer models out of the paths when it loads a model.
        set_path(new, old.path)
    # Outer layers come first. What was frozen inside a subclassed model is in no configuration.
    for old, new in zip(layers, [twin, *all_layers(twin)], strict=True):
        if new.trainable != old.trainable:
            new.trainable = old.trainable
    return twin


@contextlib.contextmanager
def _lambdas_named(layers):
    """Give the lambdas that layers hold names, {name: function}: Keras then saves no code of them.

    A file with code could only be loaded outside of Keras' safe mode.
    """
    held = (value for layer in layers for value in vars(layer).values())
    lambdas = {id(f): f for f in held if isinstance(f, types.LambdaType) and f.__name__ == LAMBDA}
    functions = {f"keras_compress_lambda_{i}": each for i, each in enumerate(lambdas.values())}
    try:
        for name, function in functions.items():
            function.__name__ = name
        yield functions
    finally:
        for function in functions.values():
            function.__name__ = LAMBDA


def _not_copied(model, received):
    return (
        f"Model '{model.name}' ({type(model).__name__}) cannot be copied: expected that saving and "
        "loading it gives the same model again. Give its classes a `get_config` with every "
        "argument of their constructors, and register its functions with "
        f"`keras.saving.register_keras_serializable()`. Received: {received}"
    )


def _equal(array, other):
    """Whether two NumPy arrays are the same bit for bit: of any type, NaN included."""
    return array.shape == other.shape and array.tobytes() == other.tobytes()


def _weights(layer):
    """Return the variables of a flat layer as the user's layer has them."""
    return layer.plain_weights if isinstance(layer, CompressedLayer) else layer.weights


def _require_fit(flat, weight_map, like):
    """Raise unless `like` has a place of the right shape for every trained weight."""
    received = [variable.path for variable in like.weights]
    for path, other in itertools.zip_longest(weight_map.paths, received):
        if path is None or other is None or _last(path) != _last(other):
            raise ValueError(
                "Expected `like` with the weights of the model that was compressed. Received: "
                f"like='{like.name}' with {len(received)} weights in place of "
                f"{len(weight_map.paths)}; the first that differs is {_quoted(other)} in place of "
                f"{_quoted(path)}."
            )
    weights = like.weights
    for name, positions in weight_map.layers.items():
        for position, trained in zip(positions, _weights(flat.get_layer(name)), strict=True):
            if position is None:
                raise ValueError(
                    f"Layer '{name}' has a weight '{trained.name}' that the original model does "
                    "not track, so it has no place in a copy. Expected a model that holds its "
                    "layers as attributes. `keras_compress.strip(model)` works without `like`."
                )
            weight = weights[position]
            if tuple(weight.shape) != tuple(trained.shape):
                raise ValueError(
                    f"Weight '{weight.path}' of `like` does not fit: expected the shape "
                    f"{tuple(trained.shape)} of '{trained.name}' in layer '{name}'. Received: "
                    f"shape {tuple(weight.shape)}."
                )


def _last(path):
    """Return a weight's own name, without the number that Keras gives to unnamed ones."""
    return path.rpartition("/")[2].rstrip("0123456789_")


def _quoted(path):
    return "none" if path is None else f"'{path}'"


def _trained_values(flat, weight_map):
    """Return {position in the user's `model.weights`: effective value}."""
    found = {}
    for name, positions in weight_map.layers.items():
        layer = flat.get_layer(name)
        compressed = isinstance(layer, CompressedLayer)
        values = layer.plain_values() if compressed else layer.get_weights()
        for position, value in zip(positions, values, strict=True):
            other, before = found.setdefault(position, (name, value))
            if not _equal(before, value):
                raise ValueError(
                    f"Layers '{other}' and '{name}' share the weight "
                    f"'{weight_map.paths[position]}' in the original model: expected one value. "
                    "Received: a value for each, because the compressed model trains and rounds "
                    "them apart. Use `keras_compress.strip(model)` without `like`."
                )
    return {position: value for position, (_, value) in found.items()}
