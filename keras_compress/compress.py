"""The verbs: `plan`, `compress_model`, `strip`. All of them trace, decide, and rebuild."""

import itertools
import logging

import keras
from rich.console import Console
from rich.progress import track

from keras_compress.algorithms import Algorithm
from keras_compress.config import Config
from keras_compress.data import input_batches
from keras_compress.graph.rebuild import deep_graphs, rebuild
from keras_compress.graph.trace import require_built, trace
from keras_compress.graph.walk import all_layers
from keras_compress.graph.weight_map import WeightMap, restore
from keras_compress.layers import (
    PACKAGE,
    CompressedLayer,
    FakeQuantize,
    compressed_class,
    exclude_from_weight_decay,
)
from keras_compress.options import ConfigError
from keras_compress.plan import Plan
from keras_compress.quantizers import Quantizer
from keras_compress.training.batch_norm import adapt_batch_norm

logger = logging.getLogger(PACKAGE)


@keras.saving.register_keras_serializable(PACKAGE)
class CompressedModel(keras.Model):
    """A Functional model that remembers how it was compressed.

    It is made by `compress_model` and saved and loaded like any Keras model. `compile` is the
    user's next step.

    Args:
        *args, **kwargs: as for `keras.Model(inputs, outputs, name=...)`.
        compression: dict with `config` (the configuration), `plan` (`Plan.to_dict()`) and
            `weight_map` (`WeightMap.to_dict()`).
    """

    def __init__(self, *args, compression=None, **kwargs):
        with deep_graphs():
            super().__init__(*args, **kwargs)
        self._compression = keras.tree.map_structure(lambda leaf: leaf, dict(compression or {}))

    @property
    def config(self):
        """The `Config` the model was compressed with."""
        return Config.load(self._compression.get("config", {}))

    @property
    def plan(self):
        """What was done, as `Plan.to_dict()` gives it."""
        return self._compression.get("plan", {})

    @property
    def weight_map(self):
        """The `WeightMap` from the weights of the user's model, or None where it was not kept."""
        found = self._compression.get("weight_map")
        return found and WeightMap(**found)

    def quantizers(self):
        """Return every `Quantizer` in the model: of weights and of edges, each once."""
        return quantizers_of(self)

    def compile(self, *args, **kwargs):
        """Compile as Keras does, keeping learned ranges out of weight decay."""
        super().compile(*args, **kwargs)
        inner = getattr(self.optimizer, "inner_optimizer", self.optimizer)
        ranges = [v for quantizer in self.quantizers() for v in quantizer.range_variables]
        if ranges and inner is not None and not inner.built:
            exclude_from_weight_decay(inner, ranges)

    def compile_from_config(self, config):
        """Compile as the saved model was; Keras asks for this wherever `compile` is overridden."""
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.optimizer is not None and self.built:
            self.optimizer.build(self.trainable_variables)

    def make_train_function(self, force=False):
        """Make the training step, unless the model lacks the callback it needs."""
        if any(q.observer is None and not q.calibrated for q in self.quantizers()):
            require_ready(self)
        return super().make_train_function(force=force)

    def quantize(self, *args, **kwargs):
        raise ValueError(
            f"Model '{self.name}' is already compressed: Keras' own post-training `quantize` would "
            "rewrite its layers. Call it on the plain model of `keras_compress.strip(model)`."
        )

    def get_config(self):
        return super().get_config() | {"compression": self._compression}


def plan(model, config):
    """Say what `compress_model` would do, without doing it.

    Args:
        model: any built Keras 3 model.
        config: dict, path of a JSON file, or `Config`.

    Returns:
        A `Plan`: printable, and a dictionary through `.to_dict()`.
    """
    config = _loaded(config)
    return _plan(_checked_graph(model), config)


def compress_model(model, config, data=None, verbose=True):
    """Clone a Keras model with compressed layers in place of its own.

    The user's model is left untouched; weights are copied and layer names stay.

    Args:
        model: any built Keras 3 model.
        config: dict, path of a JSON file (comments allowed), or `Config`. NNCF's format is
            accepted as it stands.
        data: samples to calibrate activation ranges and adapt batch-norm statistics with:
            `tf.data.Dataset`, `keras.utils.PyDataset`, NumPy arrays or a generator of batches,
            labelled or not. None: activation ranges come from the first training batches.
        verbose: whether long work shows a progress bar.

    Returns:
        An uncompiled `CompressedModel`.

    Raises:
        TypeError, ValueError: not a Keras model, unbuilt, already compressed, bad configuration or
            data; nothing has been changed then.
    """
    config = _loaded(config)
    graph = _checked_graph(model)
    decided = _plan(graph, config, with_data=data is not None)
    batches = None if data is None else _read(data, graph, config)
    compressed = _rebuild(graph, decided, config)
    for status in decided.keys:
        level = logging.INFO if status.status == "honoured" else logging.WARNING
        logger.log(level, "%s: %s (%s)", status.key, status.status, status.reason)
    _prepare(compressed, config, batches, verbose)
    return compressed


def strip(model, like=None):
    """Return a plain Keras model: weights baked in, quantizers of activations frozen.

    Only `keras.*` layers and `FakeQuantize` remain, the user's layers that were kept whole, and
    `Parameter` and `BatchSized` layers of those that were taken apart. The output equals the
    compressed model's at inference bit for bit.

    With `like`, the result is a copy of that model instead, of its own classes and nesting, which
    holds the same rounded weights and batch-norm statistics. Activation quantizers have no place
    in it and are left out: its output is the stripped model's up to the rounding of activations,
    and up to the order of float operations where only weights are quantized.

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
        return restore(model, _weight_map_for(model, like), like)

    def plain(node):
        if isinstance(node.op, CompressedLayer):
            config = node.op.get_config()
            del config["transforms"]
            return node.op.keras_class.from_config(config | {"name": node.name})
        return None

    stripped = rebuild(trace(model), swap=plain)
    for layer in stripped.layers:
        if isinstance(layer, FakeQuantize):
            layer.trainable = False
    return stripped


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


def quantizers_of(model):
    """Return every `Quantizer` inside a model, each once."""
    found = {id(x): x for x in all_layers(model) if isinstance(x, Quantizer)}
    return list(found.values())


def require_ready(model):
    """Raise when a model still lacks what only training with the `Compress` callback gives."""
    waiting = [quantizer.name for quantizer in quantizers_of(model) if not quantizer.calibrated]
    if waiting:
        raise ValueError(
            f"Model '{model.name}' has {len(waiting)} quantizers without a range: it was "
            "compressed without `data`. Train it with "
            "`callbacks=[keras_compress.callbacks.Compress()]`, or call "
            "`compress_model(model, config, data=...)`."
        )


def _loaded(config):
    """Load a configuration and make sure that it asks for something that can be done."""
    config = Config.load(config)
    if not any(algorithm.built for algorithm in config.algorithms):
        asked = [algorithm.name for algorithm in config.algorithms]
        built = sorted({c.name for c in Algorithm.registry.values() if c.built})
        raise ConfigError(
            f"Expected a configuration with at least one algorithm of {built} under `compression`. "
            f"Received: {asked or 'none'}."
        )
    return config


def _checked_graph(model):
    graph = trace(model)
    for node in graph.nodes:
        if isinstance(node.op, (CompressedLayer, FakeQuantize)):
            raise ValueError(
                f"Expected a model that is not compressed yet. Received: model '{model.name}', "
                f"whose layer '{node.name}' is a {type(node.op).__name__}. Compress the float "
                "model, or what `keras_compress.strip(model, like=original)` gives back."
            )
    return graph


def _plan(graph, config, with_data=False):
    decided = Plan(graph.name, keys=config.key_report())
    for algorithm in config.algorithms:
        if algorithm.built:
            decided = decided.merge(algorithm.plan(graph, config, with_data=with_data))
    return decided


def _rebuild(graph, decided, config):
    """Build the compressed model that a plan describes."""
    by_layer = {}
    for entry in decided.weights:
        transforms = by_layer.setdefault(entry.layer, {})
        transforms[entry.weight] = [make() for make in entry.transforms]

    def swap(node):
        if node.name not in by_layer:
            return None
        config = node.op.get_config() | {"name": node.name, "transforms": by_layer[node.name]}
        return compressed_class(node.op).from_config(config)

    quantize = [
        (entry.group, FakeQuantize(entry.transform(), name=entry.name)) for entry in decided.edges
    ]
    compression = {
        "config": config.to_dict(),
        "plan": decided.to_dict(),
        "weight_map": graph.weight_map.to_dict(),
    }
    return rebuild(graph, swap, quantize, CompressedModel, compression=compression)


def _read(data, graph, config):
    """Read and check the samples that calibration and batch-norm adaptation need."""
    samples = max((algorithm.samples_needed for algorithm in config.algorithms), default=0)
    return list(input_batches(data, graph.inputs, samples)) if samples else []


def _prepare(model, config, batches, verbose):
    """Start every algorithm on the new model, then adapt its batch-norm statistics."""

    def progress(items, description):
        console = Console(stderr=True)
        return track(items, description, console=console, transient=True, disable=not verbose)

    algorithms = [algorithm for algorithm in config.algorithms if algorithm.built]
    for algorithm in algorithms:
        algorithm.start(model, batches and progress(batches, f"{algorithm.name}: calibrating"))
    samples = max((algorithm.adaptation_samples for algorithm in algorithms), default=0)
    if batches and samples:
        seen = itertools.accumulate((len(inputs[0]) for inputs in batches), initial=0)
        chosen = [inputs for inputs, before in zip(batches, seen, strict=False) if before < samples]
        adapt_batch_norm(model, progress(chosen, "adapting batch normalization"))
