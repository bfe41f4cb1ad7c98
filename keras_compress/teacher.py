"""The model that a compressed one learns from: a frozen copy, out of sight of Keras' tracking."""

import keras

from keras_compress.graph.rebuild import deep_graphs, rebuild
from keras_compress.graph.trace import trace
from keras_compress.graph.walk import Graph


class Teacher:
    """A frozen copy of a model, called in inference mode; nothing in it ever changes.

    A `CompressedModel` holds it where neither training nor saving finds it.

    Args:
        original: any built Keras model, or its `Graph`.
    """

    def __init__(self, original):
        graph = original if isinstance(original, Graph) else trace(original)
        self.model = rebuild(graph)
        self.model.trainable = False
        self._with_features = {}

    def require_fit(self, student, features):
        """Raise where a model cannot learn from this one.

        Args:
            student: the `CompressedModel`.
            features: names of the operations that are distilled.

        Raises:
            ValueError: inputs or outputs differ in structure or shape; an operation is missing.
        """
        for what, taught, own in (
            ("inputs", self.model.input, student.input),
            ("outputs", self.model.output, student.output),
        ):
            shapes = [
                keras.tree.map_structure(lambda tensor: tuple(tensor.shape), each)
                for each in (taught, own)
            ]
            if repr(shapes[0]) != repr(shapes[1]):
                raise ValueError(
                    f"Expected a teacher with the {what} of model '{student.name}': {shapes[1]}. "
                    f"Received: model '{self.model.name}' with {shapes[0]}"
                )
        missing = sorted(set(features) - {operation.name for operation in self.model.operations})
        if missing:
            raise ValueError(
                f"Expected a teacher with the operations that are distilled. Received: model "
                f"'{self.model.name}', which lacks {missing}"
            )

    def lesson(self, inputs, features):
        """Return what the teacher makes of a batch, without gradient.

        Args:
            inputs: the batch, in the structure of the model's inputs.
            features: tuple of names of operations.

        Returns:
            (outputs, list with the output of each of `features`).
        """
        if features not in self._with_features:
            self._with_features[features] = with_features(self.model, features)
        lesson = self._with_features[features](inputs, training=False)
        return keras.tree.map_structure(keras.ops.stop_gradient, lesson)


def with_features(model, names):
    """Return a model with the same layers that gives `(outputs, [output of each operation])`.

    Args:
        model: a flat Functional model.
        names: names of operations that are called once.
    """
    operations = {operation.name: operation for operation in model.operations}
    features = [operations[name].output for name in names]
    with deep_graphs():
        return keras.Model(model.input, (model.output, features), name=model.name)


class Observed:
    """The inner tensors of a model's last call in training mode, until the loss takes them."""

    def __init__(self):
        self._models = {}
        self._tensors = {}

    def call(self, model, names, inputs, **kwargs):
        """Call a model and keep the outputs of the operations `names`; returns its outputs."""
        if names not in self._models:
            self._models[names] = with_features(model, names)
        outputs, features = self._models[names](inputs, **kwargs)
        self._tensors = dict(zip(names, features, strict=True))
        return outputs

    def take(self, names):
        """Return {operation: tensor} of the last call, and forget it.

        Raises:
            ValueError: there was no such call.
        """
        found, self._tensors = self._tensors, {}
        if not found.keys() >= set(names):
            raise ValueError(
                "Expected the model to be called on the batch with `training=True` just before its "
                "loss is computed, since inner tensors are distilled. Received: no such call"
            )
        return found
