"""Knowledge distillation: the compressed model learns from the outputs of the original."""

from typing import ClassVar, Literal

import keras
import pydantic

from keras_compress.algorithms.base import Algorithm, ScopedOptions, check_scopes
from keras_compress.graph.walk import Role
from keras_compress.layers import FakeQuantize
from keras_compress.options import ConfigError, number, option
from keras_compress.plan import Plan

PROBABILITIES = {keras.activations.softmax: "softmax", keras.activations.sigmoid: "sigmoid"}
PROBABILITIES_BY_NAME = {"Softmax": "softmax", "Sigmoid": "sigmoid"}  # layers and `keras.ops`


class Features(ScopedOptions):
    """The inner tensors that are distilled, beside the outputs."""

    scale: number(0) = option(1.0, "Factor on the loss of each.")
    loss: Literal["mse", "mae", "cosine_similarity"] = option("mse", "Loss between two tensors.")


class SoftTargets(keras.distillation.DistillationLoss):
    """Cross entropy of the student's soft probabilities under the teacher's.

        loss = T^2 mean(sum_c -softmax(t / T) log_softmax(s / T))

    with logits `s` of the student and `t` of the teacher; the sum goes over the classes, the last
    axis, the mean over all others. From `keras.distillation.LogitsDistillation` it differs by the
    entropy of the teacher, which has no gradient, and in that no probability is clipped: small ones
    keep their gradient. Outputs that are probabilities have logits `log p`; each unit behind a
    sigmoid is a distribution over two classes.

    Shapes: outputs of any rank, with the classes last.

    Args:
        temperature: T.
        kind: `"logits"`, `"softmax"` or `"sigmoid"`: what the outputs are.

    Reference: Hinton et al., Distilling the Knowledge in a Neural Network, 2015, section 2,
    arXiv:1503.02531.
    """

    def __init__(self, temperature, kind="logits"):
        self.temperature = temperature
        self.kind = kind

    def compute_loss(self, teacher_outputs, student_outputs, **kwargs):
        """Return the loss, a scalar."""
        ops = keras.ops
        t, s = (self._logits(x) / self.temperature for x in (teacher_outputs, student_outputs))
        if self.kind == "sigmoid":
            losses = ops.sum(ops.binary_crossentropy(ops.sigmoid(t), s, from_logits=True), axis=-1)
        else:
            losses = ops.categorical_crossentropy(ops.softmax(t), s, from_logits=True)
        return self.temperature**2 * ops.mean(losses)

    def _logits(self, outputs):
        if self.kind == "logits":
            return outputs
        tiny = keras.backend.epsilon()
        outputs = keras.ops.clip(outputs, tiny, 1 - tiny)
        odds = outputs if self.kind == "softmax" else outputs / (1 - outputs)
        return keras.ops.log(odds)


class KnowledgeDistillation(Algorithm):
    """Distillation of the original model into the compressed one.

    The teacher is a copy of the original as `compress_model` got it, in inference mode: nothing in
    it ever changes. What is added to the loss of every training step:

        softmax   scale T^2 mean(sum_c -softmax(t / T) log_softmax(s / T)), over outputs of rank 2
                  and those behind a softmax or a sigmoid: see `SoftTargets`
        mse       scale mean((t - s)^2), over floating-point outputs

    summed over the outputs; with `features` also `scale loss(t, s)` of each chosen inner tensor. A
    model that is loaded from a file needs its teacher again: `CompressedModel.set_teacher`.

    The key `features` goes beyond NNCF's format.

    Example:

    >>> distillation = KnowledgeDistillation(type="softmax", temperature=4, scale=0.5)
    >>> distillation.to_dict()["temperature"]
    4
    """

    name: ClassVar[str] = "knowledge_distillation"
    needs_teacher: ClassVar[bool] = True

    type: Literal["softmax", "mse"] = option(..., "Loss between the two models' outputs.")
    scale: number(0) = option(1.0, "Factor on that loss.")
    temperature: number(0) = option(1.0, "Softness of the probabilities; softmax only.")
    features: Features | None = option(
        None, "Inner tensors that are distilled too: outputs of the nodes chosen. Extension."
    )
    compression_lr_multiplier: number(0) | None = option(
        None, "Accepted for the shared format; this algorithm trains no parameters of its own."
    )

    def plan(self, graph, config, with_data):
        """Returns notes: which outputs and which inner tensors are distilled."""
        kinds = self._kinds(graph)
        named = list(zip(graph.outputs, kinds, strict=True))
        if not any(kinds):
            shapes = ", ".join(f"{edge.name} {edge.shape} {edge.dtype}" for edge in graph.outputs)
            raise ConfigError(
                f"Expected an output that can be distilled with type={self.type!r}. Received: "
                f"{shapes}. 'softmax' takes outputs of rank 2 with at least two classes and those "
                "behind a softmax or sigmoid; 'mse' takes all of floating point."
            )
        taken = ", ".join(f"{edge.name} ({kind})" for edge, kind in named if kind)
        notes = [f"knowledge_distillation ({self.type}): outputs {taken}"]
        left = ", ".join(edge.name for edge, kind in named if not kind)
        if left:
            notes.append(f"knowledge_distillation: outputs {left} are no distribution: left out")
        if self.features is not None:
            chosen = self._checked_features(graph)
            notes.append(f"knowledge_distillation: inner tensors {', '.join(chosen)}")
        return Plan(graph.name, notes=tuple(notes))

    def start(self, model, batches) -> None:
        """Notes what each output is, and which inner tensors are distilled."""
        graph = model.graph()
        features = {} if self.features is None else dict.fromkeys(self._features(graph))
        model.progress[self.name] = {"outputs": self._kinds(graph), "features": features}

    def feature_names(self, model) -> tuple[str, ...]:
        """Returns the names of the operations whose outputs are distilled, inside the model."""
        return tuple(model.progress.get(self.name, {}).get("features", ()))

    def loss(self, model, inputs, outputs):
        """Returns the distance between what the model and its teacher make of a batch."""
        noted = model.progress[self.name]
        taught, taught_features, features = model.lesson(inputs)
        pairs = zip(keras.tree.flatten(taught), keras.tree.flatten(outputs), strict=True)
        total = 0.0
        for kind, (teacher, student) in zip(noted["outputs"], pairs, strict=True):
            if kind is not None:
                criterion = self._criterion(kind)
                total += self.scale * criterion.compute_loss(_float32(teacher), _float32(student))
        for name, cut in noted["features"].items():
            criterion = keras.distillation.FeatureDistillation(self.features.loss)
            teacher, student = _taken(taught_features[name], cut), features[name]
            loss = criterion.compute_loss(_float32(teacher), _float32(student))
            total += self.features.scale * loss
        return total

    def cut(self, progress, narrowing) -> None:
        """Notes which channels of the distilled inner tensors are left: (axis, positions)."""
        layers = narrowing.graph.layer_nodes()
        features = progress[self.name]["features"]
        for name, before in list(features.items()):
            edge = layers[name].output
            if edge in narrowing.coupling.edges:
                axis, kept = narrowing.positions(edge)
                positions = kept.nonzero()[0]
                if before is not None:
                    positions = [before[1][position] for position in positions]
                features[name] = [axis, [int(position) for position in positions]]

    def _criterion(self, kind):
        if self.type == "mse":
            return keras.distillation.FeatureDistillation("mse")
        return SoftTargets(self.temperature, kind)

    def _kinds(self, graph):
        """Return what each output is, a list: `kind_of_output`, or None where it is left out."""
        kinds = []
        for edge in graph.outputs:
            kind = kind_of_output(edge)
            classes = kind != "logits" or (len(edge.shape) == 2 and edge.shape[-1] != 1)
            taken = edge.is_float and (self.type == "mse" or classes)
            kinds.append(kind if taken else None)
        return kinds

    def _features(self, graph):
        """Return the names of the operations that `features` chooses, each one once."""
        nodes = graph.layer_nodes().values()
        nodes = [node for node in nodes if node.role is not Role.FAKE_QUANTIZE]
        return [node.name for node in nodes if self.features.selects(node.name)]

    def _checked_features(self, graph):
        names = [node.name for node in graph.nodes]
        if self.validate_scopes:
            check_scopes(self.features.scope_lists("features."), names)
        chosen = self._features(graph)
        layers = graph.layer_nodes()
        unfit = [
            name
            for name in chosen
            if len(layers[name].outputs) != 1
            or not layers[name].output.is_float
            or names.count(name) > 1
        ]
        if unfit or not chosen:
            raise ConfigError(
                "Expected `features` to choose operations that are called once and give one tensor "
                f"of floating point. Received: {unfit or 'none'}"
            )
        return chosen

    @pydantic.model_validator(mode="after")
    def _check_temperature(self):
        if self.temperature == 0:
            raise ValueError("expected a temperature above 0. Received: temperature=0")
        return self


def kind_of_output(edge):
    """Return what a tensor of a graph is: `"softmax"`, `"sigmoid"`, or `"logits"` for any other."""
    node = edge.producer
    while node is not None and _changes_nothing(node.op):
        node = node.inputs[0].producer
    if node is None:
        return "logits"
    by_name = PROBABILITIES_BY_NAME.get(type(node.op).__name__)
    return by_name or PROBABILITIES.get(getattr(node.op, "activation", None), "logits")


def _changes_nothing(op):
    linear = isinstance(op, keras.layers.Activation) and op.activation is keras.activations.linear
    return linear or isinstance(op, (keras.layers.Identity, FakeQuantize))


def _float32(tensor):
    return keras.ops.cast(tensor, "float32")


def _taken(tensor, cut):
    """Return the channels of a teacher's tensor that the student still has."""
    if cut is None:
        return tensor
    axis, positions = cut
    return keras.ops.take(tensor, positions, axis=axis)
