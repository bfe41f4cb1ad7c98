"""The way back from a compressed model to a plain one."""

import keras

from keras_compress.algorithms.pruning_plan import MaskedGraph
from keras_compress.graph.rebuild import rebuild
from keras_compress.graph.trace import require_built, trace
from keras_compress.graph.walk import all_layers
from keras_compress.graph.weight_map import restore
from keras_compress.layers import CompressedLayer, FakeQuantize
from keras_compress.masks import ChannelMask
from keras_compress.model_facts import require_ready

STATISTICS = (
    keras.layers.LayerNormalization,
    keras.layers.GroupNormalization,
    keras.layers.RMSNormalization,
)


def strip(model, like=None):
    """Return a plain Keras model: filters gone, weights baked in, quantizers of activations frozen.

    Channels that masks switch off are taken out of every layer that they touch; the output stays
    that of the compressed model, up to the order of sums. Without masks it is equal at inference
    bit for bit; on torch up to the order of sums, where weights lie in memory by columns. Only
    `keras.*` layers and `FakeQuantize` remain, the user's layers that were kept whole, and
    `Parameter` and `BatchSized` layers of those that were taken apart.

    With `like`, the result is a copy of that model instead, of its own classes and nesting, which
    holds the same rounded weights and batch-norm statistics, and zeros where filters were pruned:
    shapes stay. Activation quantizers have no place in it and are left out: its output is the
    stripped model's up to the rounding of activations, and up to the order of float operations
    where only weights are quantized.

    Args:
        model: a compressed model, or any model that holds compressed layers.
        like: the model that `compress_model` was given, or another of the same structure, e.g.
            loaded again from its file. It is left untouched. None: a flat Functional model.

    Raises:
        TypeError: `like` is not a Keras model.
        ValueError: a quantizer still lacks its range; `like` is not built, has other weights or
            cannot be copied; `model` does not know which weights it was made from.

    Example:

    ```python
    compressed = kc.compress_model(classifier, config, data=train_ds)
    ...
    plain = kc.strip(compressed, like=classifier)
    assert type(plain) is type(classifier)
    ```
    """
    require_ready(model)
    if like is not None:
        _require_plain_statistics(model)
        return restore(model, _weight_map_for(model, like), like)

    graph = trace(model)
    masked = MaskedGraph.of(graph)
    narrowing = masked and masked.narrowing

    def plain(node):
        if isinstance(node.op, CompressedLayer):
            config = node.op.get_config()
            del config["transforms"]
            changed = narrowing.configuration(node) if narrowing else {}
            return node.op.keras_class.from_config(config | changed | {"name": node.name})
        return None

    stripped = rebuild(graph, swap=plain, narrowing=narrowing)
    for layer in stripped.layers:
        if isinstance(layer, FakeQuantize):
            layer.trainable = False
    return stripped


def _require_plain_statistics(model):
    """Raise where a layer keeps masked channels out of its statistics, which a plain one cannot."""
    for layer in all_layers(model):
        if isinstance(layer, STATISTICS) and isinstance(layer, CompressedLayer):
            transforms = [t for name in layer.weight_names for t in layer.transforms_of(name)]
            masks = [each for each in transforms if isinstance(each, ChannelMask)]
            if any(not mask.mask(axis).all() for mask in masks for axis in mask.axes):
                raise ValueError(
                    f"Layer '{layer.name}' takes its statistics over the channels that masks leave "
                    "on, which the original's layer cannot do at its full width. Expected a model "
                    "without normalization over pruned channels. Use "
                    "`keras_compress.strip(model)` without `like`."
                )


def _weight_map_for(model, like):
    require_built(like)
    weight_map = getattr(model, "weight_map", None)
    if weight_map is None:
        raise ValueError(
            "`like` needs a model made by this version of `compress_model`, which notes where "
            f"each weight came from. Received: model '{model.name}' ({type(model).__name__}) "
            "without such a map. Use `keras_compress.strip(model)` without `like`, or compress "
            "the original model again."
        )
    return weight_map
