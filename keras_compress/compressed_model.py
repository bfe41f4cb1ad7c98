"""The compressed model."""

import inspect
import json
import math

import keras
import numpy as np

from keras_compress.algorithms.base import Algorithm
from keras_compress.config import Config
from keras_compress.graph.rebuild import deep_graphs, rebuild
from keras_compress.graph.trace import trace
from keras_compress.graph.weight_map import WeightMap
from keras_compress.layers import (
    PACKAGE,
    FakeQuantize,
    compressed_class,
    exclude_from_weight_decay,
)
from keras_compress.model_facts import (
    facts_of,
    quantizers_of,
    require_ready,
    seeds_of,
    set_facts,
    transforms_of,
)
from keras_compress.replicas import is_one_of_many_workers, scope_of, share_of
from keras_compress.teacher import Observed, Teacher
from keras_compress.whole_files import replacing_if_local

FACTS, SEED = "facts", "seed_{}"  # names in a file of weights


@keras.saving.register_keras_serializable(PACKAGE)
class CompressedModel(keras.Model):
    """A Functional model that remembers how it was compressed.

    It is made by `compress_model` and saved and loaded like any Keras model. `compile` is the
    user's next step.

    Args:
        *args, **kwargs: as for `keras.Model(inputs, outputs, name=...)`.
        compression: dict with `config` (the configuration), `plan` (`Plan.to_dict()`),
            `weight_map` (`WeightMap.to_dict()`) and `progress` (see there).
        dtype: dtype policy that `compile` asks whether to scale the loss; None: the global one.
            Layers have their own.
    """

    _teacher = staticmethod(lambda: None)

    def __init__(self, *args, compression=None, dtype=None, **kwargs):
        with deep_graphs():
            super().__init__(*args, **kwargs)
        if dtype is not None:  # which Keras' Functional models do not take
            self.dtype_policy = dtype
        self._compression = keras.tree.map_structure(lambda leaf: leaf, dict(compression or {}))
        algorithms = self.config.algorithms
        self._algorithms_with_loss = [a for a in algorithms if type(a).loss is not Algorithm.loss]
        self._needs_teacher = any(algorithm.needs_teacher for algorithm in algorithms)
        self._observed = Observed()

    @property
    def config(self):
        """The `Config` the model was compressed with."""
        # Not `load`: what a file of a model says here is never the path of another file.
        return Config.build(self._compression.get("config", {}))

    @property
    def plan(self):
        """What was done, as `Plan.to_dict()` gives it."""
        return self._compression.get("plan", {})

    @property
    def weight_map(self):
        """The `WeightMap` from the weights of the user's model, or None where it was not kept."""
        found = self._compression.get("weight_map")
        return found and WeightMap(**found)

    @property
    def progress(self):
        """How far each algorithm is, {its name: dict}: saved with the model."""
        return self._compression.setdefault("progress", {})

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """Compute the loss as Keras does; in training, with what the algorithms add to it."""
        loss = super().compute_loss(x, y, y_pred, sample_weight, training)
        for algorithm in self._algorithms_with_loss if training else ():
            added = algorithm.loss(self, x, y_pred)
            if added is not None:
                loss = loss + share_of(added)
        return loss

    def graph(self):
        """Return the `Graph` of the model."""
        return trace(self)

    def set_teacher(self, original):
        """Give the model the one that it learns from, with `knowledge_distillation`.

        `compress_model` does so. A file holds no teacher: a model that is loaded from one needs it
        again before it is trained. Any other model with the same inputs and outputs will do too,
        such as a larger one.

        Args:
            original: a built Keras model, which is copied, or its `Graph`.

        Raises:
            TypeError, ValueError: not a built Keras model; its inputs or outputs have other shapes
                or another structure, or it lacks an operation that is distilled.
        """
        teacher = Teacher(original)
        teacher.require_fit(self, self._feature_names())
        self._teacher = lambda: teacher  # in a function, where Keras does not look for layers

    def take_teacher_of(self, other):
        """Share the teacher of another model, which this one was made from, if it has one."""
        self._teacher = other._teacher

    def lesson(self, inputs):
        """Return what the teacher makes of a batch, and the model's own inner tensors.

        Args:
            inputs: the batch that the model was called with in training mode, just before.

        Returns:
            (outputs of the teacher, {operation: tensor of the teacher}, {operation: tensor of the
            model}), the last two with what the algorithms' `feature_names` asked for.

        Raises:
            ValueError: there is no teacher; inner tensors are asked for without such a call.
        """
        self._require_teacher()
        names = self._feature_names()
        outputs, taught = self._teacher().lesson(inputs, names)
        own = self._observed.take(names)
        return outputs, dict(zip(names, taught, strict=True)), own

    def call(self, inputs, training=None, mask=None, **kwargs):
        """Call the model as Keras does; in training, keep the inner tensors that losses need."""
        names = self._feature_names() if training and self._teacher() is not None else ()
        if not names:
            return super().call(inputs, training=training, mask=mask, **kwargs)
        return self._observed.call(self, names, inputs, training=training, mask=mask, **kwargs)

    def _feature_names(self):
        names = [name for a in self._algorithms_with_loss for name in a.feature_names(self)]
        return tuple(dict.fromkeys(names))

    def _require_teacher(self):
        if self._needs_teacher and self._teacher() is None:
            raise ValueError(
                f"Model '{self.name}' learns from the original (`knowledge_distillation`), which "
                "no file holds. Expected `model.set_teacher(original)` before training, with the "
                "model that was compressed. Received: no teacher"
            )

    def quantizers(self):
        """Return every `Quantizer` in the model: of weights and of edges, each once."""
        return quantizers_of(self)

    def compile(self, *args, **kwargs):
        """Compile as Keras does, keeping learned ranges and masks out of weight decay."""
        super().compile(*args, **kwargs)
        bound = inspect.signature(keras.Model.compile).bind(self, *args, **kwargs)
        # In a function, where Keras does not look for layers and variables.
        given = {name: value for name, value in bound.arguments.items() if name != "self"}
        self._given_to_compile = lambda: dict(given)
        inner = getattr(self.optimizer, "inner_optimizer", self.optimizer)
        states = [v for transform in transforms_of(self) for v in transform.undecayed_variables]
        if states and inner is not None and not inner.built:
            exclude_from_weight_decay(inner, states)

    @property
    def compiled_with(self):
        """The arguments that `compile` was called with, {name: value}."""
        return self._given_to_compile()

    def get_compile_config(self):
        """Return what the model was compiled with, for a file that every backend reads."""
        return _with_public_optimizers(super().get_compile_config())

    def compile_from_config(self, config):
        """Compile as the saved model was; Keras asks for this wherever `compile` is overridden."""
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.optimizer is not None and self.built:
            self.optimizer.build(self.trainable_variables)

    def fit(self, *args, **kwargs):
        """Train as Keras does, with the callback `Compress`.

        Raises:
            ValueError: under `tf.distribute.MultiWorkerMirroredStrategy`, where Keras' `fit` fails.
        """
        with scope_of(self):
            if is_one_of_many_workers():
                raise ValueError(
                    "Expected a training loop of your own under MultiWorkerMirroredStrategy: "
                    "`fit` of Keras 3 does not run there, with any model. "
                    f"Received: `fit` of model '{self.name}'. Call `keras_compress.step` before "
                    "every step, as in `examples/distributed.py`."
                )
        return super().fit(*args, **kwargs)

    def make_train_function(self, force=False):
        """Make the training step, unless the model lacks the callback it needs."""
        if any(q.observer is None and not q.calibrated for q in self.quantizers()):
            require_ready(self)
        self._require_teacher()
        return super().make_train_function(force=force)

    def save(self, filepath, overwrite=True, zipped=None, **kwargs):
        """Save as Keras does. What stood there before stays until the new file is whole."""
        with replacing_if_local(filepath, overwrite) as path:
            super().save(path, overwrite=overwrite, zipped=zipped, **kwargs)

    def save_weights(self, filepath, overwrite=True, max_shard_size=None):
        """Save as Keras does. A single file appears whole or not at all; shards do not."""
        if max_shard_size is not None:
            super().save_weights(filepath, overwrite, max_shard_size)
            return
        with replacing_if_local(filepath, overwrite, _size(self)) as path:
            super().save_weights(path, overwrite)

    def save_own_variables(self, store):
        """Keep what is no weight in files of weights too: `facts_of`, seeds of random layers."""
        store[FACTS] = np.frombuffer(json.dumps(facts_of(self)).encode(), "uint8")
        for index, seed in enumerate(seeds_of(self)):
            store[SEED.format(index)] = keras.ops.convert_to_numpy(seed)

    def load_own_variables(self, store):
        """Take up what `save_own_variables` kept; files of earlier versions hold nothing.

        Raises:
            ValueError: the file is of another model.
        """
        if FACTS not in store.keys():  # noqa: SIM118 (Keras' stores are no mappings)
            return
        changed = set_facts(self, json.loads(np.asarray(store[FACTS]).tobytes()))
        for index, seed in enumerate(seeds_of(self)):
            if SEED.format(index) in store.keys():  # noqa: SIM118
                seed.assign(np.asarray(store[SEED.format(index)]))
        if changed:
            self._forget_what_was_compiled_before()

    def _forget_what_was_compiled_before(self):
        """Drop compiled functions; within `fit`, which holds one, make it anew."""
        self.forget_inference()
        trains = self.train_function is not None
        self.train_function = None
        if trains and all(q.calibrated or q.observer is not None for q in self.quantizers()):
            self.make_train_function(force=True)

    def forget_inference(self):
        """Drop the compiled functions of `evaluate` and `predict`, which are then traced anew."""
        self.test_function = None
        self.predict_function = None

    def forget_compiled(self):
        """Have all compiled functions made anew: something that they hold has changed."""
        self.forget_inference()
        if self.compiled:
            self.make_train_function(force=True)

    def quantize(self, *args, **kwargs):
        raise ValueError(
            f"Model '{self.name}' is already compressed: Keras' own post-training `quantize` would "
            "rewrite its layers. Call it on the plain model of `keras_compress.strip(model)`."
        )

    def get_config(self):
        policy = keras.dtype_policies.serialize(self.dtype_policy)
        return super().get_config() | {"compression": self._compression, "dtype": policy}


def _with_public_optimizers(config):
    """Name Keras' optimizers by their public module, however deep they are in a configuration.

    On torch Keras serializes the subclasses for torch that it makes of them, which fail elsewhere.
    """
    if isinstance(config, (list, tuple)):
        return [_with_public_optimizers(each) for each in config]
    if not isinstance(config, dict):
        return config
    config = {key: _with_public_optimizers(value) for key, value in config.items()}
    optimizer = getattr(keras.optimizers, str(config.get("class_name")), None)
    if optimizer is not None and str(config.get("module")).partition(".")[0] == "keras":
        config |= {"module": "keras.optimizers", "registered_name": None}
    return config


def compressed_by(graph, decided, config):
    """Return the `CompressedModel` that a `Plan` describes, before anything is calibrated.

    Args:
        graph: the `Graph` of the user's model.
        decided: the `Plan`.
        config: the `Config` that it carries.
    """
    by_layer = {}
    for entry in decided.weights:
        transforms = by_layer.setdefault(entry.layer, {})
        transforms[entry.weight] = [make() for make in entry.transforms]

    def swap(node):
        if node.name not in by_layer:
            return None
        config = node.op.get_config() | {"name": node.name, "transforms": by_layer[node.name]}
        return compressed_class(node.op, by_layer[node.name]).from_config(config)

    quantize = [
        (entry.group, FakeQuantize(entry.transform(), name=entry.name)) for entry in decided.edges
    ]
    compression = {
        "config": config.to_dict(),
        "plan": decided.to_dict(),
        "weight_map": graph.weight_map.to_dict(),
    }
    return rebuild(graph, swap, quantize, CompressedModel, compression=compression)


def _size(model):
    """Return the bytes that a file of a model's weights and its optimizer's state has at least."""
    optimizer = getattr(model, "optimizer", None)
    variables = [*model.weights, *(optimizer.variables if optimizer is not None else ())]
    return sum(4 * math.prod(each.shape) for each in variables if each.dtype == "float32")
