"""What the algorithms share that put a mask of its own shape on every weight."""

import dataclasses
import functools
import re
from typing import ClassVar

import keras
import numpy as np

from keras_compress.algorithms.base import Algorithm, check_scopes
from keras_compress.compressed_layer import layer_spec
from keras_compress.graph.flops import flops, total_flops
from keras_compress.graph.walk import Role
from keras_compress.layer_specs import DEPTHWISE, TRANSPOSED
from keras_compress.options import ConfigError
from keras_compress.plan import Plan, Untouched, WeightEntry
from keras_compress.sparsity_schedules import Adaptive, AdaptiveState


@dataclasses.dataclass(frozen=True)
class MaskedWeight:
    """A weight of a compressed model and the mask that it is read through.

    Attributes:
        layer: the layer.
        weight: attribute of the weight.
        mask: the transform.
    """

    layer: object
    weight: str
    mask: object

    def value(self):
        """Return the weight as it is trained, a NumPy array that may share the weight's memory."""
        held = self.layer.raw_weight(self.weight).value
        held = held.read_value() if hasattr(held, "read_value") else held
        if keras.backend.backend() == "torch":
            return keras.ops.convert_to_numpy(held)
        return np.asarray(held)

    @property
    def input_axis(self):
        """The axis that is summed over where the weight is used; None where there is none."""
        return input_axis(self.layer, self.weight)


class WeightSparsity(Algorithm):
    """Base of the algorithms that put a mask of its own shape on every weight.

    A subclass says what the mask is and when it changes.
    """

    def make_mask(self, config, node, weight):
        """Returns a function that makes the mask of a weight, and its description in the plan."""
        raise NotImplementedError(f"{type(self).__name__} must define `make_mask`.")

    def why_not(self, node) -> str:
        """Returns why a layer with weights is left alone, or an empty string."""
        return "" if self.selects(node.name) else "excluded by the scopes of the configuration"

    def plan(self, graph, config, with_data):
        """Returns which weights are masked, and what is left alone."""
        weighted = [n for n in graph.layer_nodes().values() if n.role is Role.WEIGHTED]
        if self.validate_scopes:
            check_scopes(self.scope_lists(), [node.name for node in weighted])
        total = max(total_flops(graph), 1)
        entries, untouched = [], []
        for node in weighted:
            reason = self.why_not(node)
            if reason:
                count = flops(node)
                kind = type(node.op).__name__
                left = f"not sparse: {reason}"
                untouched.append(Untouched(node.name, kind, left, count, count / total))
                continue
            for weight in layer_spec(node.op).weights:
                make, text = self.make_mask(config, node, weight)
                entries.append(WeightEntry(node.name, weight, (make,), text))
        if not entries:
            reasons = "; ".join(dict.fromkeys(entry.reason for entry in untouched))
            raise ConfigError(
                "Expected a model with weights that can be made sparse, and scopes "
                "(`ignored_scopes`, `target_scopes`) that leave some. Received: model "
                f"'{graph.name}' with {len(weighted)} layers with weights, none of which is "
                f"chosen ({reasons or 'there is none'})."
            )
        return Plan(graph.name, weights=tuple(entries), untouched=tuple(untouched))

    def named(self, cls, **arguments):
        """Returns a function that makes a mask that is found again by `masked`."""
        return functools.partial(cls, name=self.mask_name, **arguments)

    @property
    def mask_name(self) -> str:
        """Name of the masks of this algorithm."""
        return f"{self.name}_mask"

    def masked(self, model) -> list[MaskedWeight]:
        """Returns the weights of a compressed model that this algorithm masks, in their order."""
        return [
            MaskedWeight(layer, weight, mask)
            for layer in model.layers
            for weight in getattr(layer, "weight_names", ())
            for mask in layer.transforms_of(weight)
            if mask.name == self.mask_name
        ]

    def sparsity(self, model) -> float:
        """Returns the fraction of the masked weights that are off, in [0, 1]."""
        return 1 - _share_on(self.masked(model))

    def statistics(self, model) -> dict[str, float]:
        """Returns the fraction of weights that are off: of all, and of every layer."""
        figures = {"sparsity": self.sparsity(model)}
        for entry in self.masked(model):
            key = f"sparsity/{entry.layer.name}"
            if entry.weight != "kernel":
                key += f"/{entry.weight}"
            figures[key] = 1 - _share_on([entry])
        return figures


class ScheduledSparsity(WeightSparsity):
    """Base of the algorithms whose level follows a schedule, by epochs or by steps.

    A subclass has `params`, a `SparsityParams`, and `sparsity_init`, and says in `set_level` what a
    level does to the masks.
    """

    adjustable: ClassVar[bool] = True

    def freeze(self, model) -> None:
        """Called once, at the end of the course."""

    @property
    def schedule(self):
        """The course of the level: a `SparsitySchedule`."""
        return self.params.schedule_from(self.sparsity_init)

    @property
    def level_at_start(self) -> float:
        """Level of epoch 0."""
        schedule = self.schedule
        return schedule.start.level if isinstance(schedule, Adaptive) else schedule(0)

    @property
    def final_rate(self) -> float:
        """The level in the end."""
        return self.params.final_sparsity

    def start(self, model, batches) -> None:
        """Sets the level of epoch 0."""
        self.begin_epoch(model, 0)

    def begin_epoch(self, model, epoch: int) -> None:
        """Sets the level of an epoch, which never falls behind one that was reached."""
        reached = model.progress.get(self.name, {})
        if reached.get("frozen") or reached.get("held") or reached.get("epoch") == epoch:
            return
        if "level" in reached and self.schedule.frozen(epoch):
            self._freeze(model)
        else:
            self._move(model, epoch)

    def update(self, model, step: int, epoch: float | None) -> bool:
        """Sets the level in every step, where `update_per_optimizer_step` says so."""
        reached = model.progress.get(self.name, {})
        if not self.params.update_per_optimizer_step or self.masks_are_final(model):
            return False
        if reached.get("held"):
            return False
        if self.params.steps_per_epoch is not None:
            epoch = step / self.params.steps_per_epoch
        if epoch is None or epoch <= reached.get("epoch", -1):
            return True
        if self.schedule.frozen(epoch):
            self._freeze(model)
            return False
        self._move(model, epoch)
        return True

    def masks_are_final(self, model) -> bool:
        """Says whether masks are frozen."""
        return model.progress.get(self.name, {}).get("frozen", False)

    def _freeze(self, model):
        self.freeze(model)
        model.progress[self.name] = dict(model.progress[self.name]) | {"frozen": True}

    def _move(self, model, epoch):
        reached = dict(model.progress.get(self.name, {}))
        schedule = self.schedule
        if not isinstance(schedule, Adaptive):
            level = schedule(epoch)
        elif "level" not in reached:
            level, reached["bad_epochs"] = schedule.start
        else:
            state = AdaptiveState(reached["level"], reached["bad_epochs"])
            level, reached["bad_epochs"] = schedule.next(state, self.sparsity(model))
        level = max(level, reached.get("level", 0.0))
        self.set_level(model, level)
        model.progress[self.name] = reached | {"epoch": epoch, "level": level, "frozen": False}


def _share_on(masked):
    """Return the fraction of weights that masks leave on."""
    masks = [entry.mask.mask_values() for entry in masked]
    return sum(map(np.count_nonzero, masks)) / max(sum(mask.size for mask in masks), 1)


def input_axis(layer, weight):
    """Return the axis of a weight that is summed over, counted from the end, or None.

    Convolution kernels have it at -2 (-1 where transposed), dense and recurrent ones at -2. A
    depthwise kernel sums over space, a table of vectors over nothing.
    """
    if isinstance(layer, (*DEPTHWISE, keras.layers.Embedding)):
        return None
    if weight == "depthwise_kernel":
        return None
    if isinstance(layer, TRANSPOSED):
        return -1
    if isinstance(layer, keras.layers.EinsumDense):
        operands, _, output = re.sub(r"\s|\.\.\.", "", layer.equation).partition("->")
        kernel = operands.split(",")[1]
        summed = [i - len(kernel) for i, letter in enumerate(kernel) if letter not in output]
        return summed[-1] if summed else None
    return -2
