"""How LeGR judges a ranking: prune by it, train a little, measure the loss on held-out data."""

import math

import keras
import numpy as np

from keras_compress.algorithms.legr import check_save_path, evolve, write_ranking
from keras_compress.algorithms.pruning_plan import HIGHEST_LEVEL, Prunable, set_masks
from keras_compress.data import labelled_batches
from keras_compress.options import ConfigError
from keras_compress.training.compiled import built_optimizer, compile_arguments

EVERY = 5  # of so many batches, one is held out
FEWEST_BATCHES = 50  # that are read, where there are as many, however short the training is


class RankingSearch:
    """What is needed to learn a global ranking, checked before any work is done.

    Of the labelled batches every fifth is held out for the loss, at least one; the others train.
    With `train_steps` 0 all are for the loss. No more are read, and held in memory, than
    `5/4 * train_steps` or 50, whichever is more.

    Args:
        pruning: the `FilterPruning`.
        model: the user's model, compiled: its loss and a fresh copy of its optimizer are used.
        data: the labelled data.
        inputs: the model's inputs in order, each with a `name` and a `shape`.

    Raises:
        ValueError: the model is not compiled with a loss, there are no data or labels, or fewer
            than two batches.
        ConfigError: the result could not be written.
    """

    def __init__(self, pruning, model, data, inputs):
        self.pruning = pruning
        self.options = pruning.params.legr_params
        if pruning.params.save_ranking_coeffs_path is not None:
            check_save_path(pruning.params.save_ranking_coeffs_path)
        self.compile_arguments = compile_arguments(
            model,
            "`interlayer_ranking_type` 'learned_ranking'",
            "With `load_ranking_coeffs_path` nothing is learned and no loss is needed.",
        )
        if data is None:
            raise ValueError(_needed("Received: data=None"))
        limit = max(math.ceil(self.options.train_steps * EVERY / (EVERY - 1)), FEWEST_BATCHES)
        batches = labelled_batches(data, inputs, limit)
        self.training, self.held_out = self._split(batches)

    def _split(self, batches):
        if self.options.train_steps == 0:
            return [], batches
        if len(batches) < 2:
            raise ValueError(_needed("Received: 1 batch, which cannot be split"))
        held_out = range(EVERY - 1, len(batches), EVERY) or [len(batches) - 1]
        training = [batch for i, batch in enumerate(batches) if i not in held_out]
        return training, [batches[i] for i in held_out]

    @classmethod
    def of(cls, config, model, data, inputs):
        """Return the search that a configuration asks for, or None."""
        for pruning in config.algorithms:
            if pruning.name == "filter_pruning" and pruning.params.is_to_learn:
                return cls(pruning, model, data, inputs)
        return None

    def run(self, candidate, report=None):
        """Return the ranking found, `{layer: (scale, shift)}`; it is written where that is asked.

        Args:
            candidate: an uncompiled model with the masks of the pruning, which is used up.
            report: function `(generation, fitness, highest fitness so far)`.

        Raises:
            ConfigError: the level at which candidates are judged cannot be reached.
            ValueError: no candidate has a finite loss.
        """
        candidate.compile(**self.compile_arguments)
        judge = Judge(self, candidate)
        ranking, _ = evolve(judge.spreads, judge, self.options, report)
        path = self.pruning.params.save_ranking_coeffs_path
        if path is not None:
            write_ranking(path, ranking)
        return ranking


class Judge:
    """Function `ranking -> fitness`: minus the loss on held-out batches after some training.

    Every ranking meets the same weights, optimizer, seed generators and batches. Rankings that
    leave the same channels have the same fitness, which is computed once. The compiled training
    step is the same one for all, since masks are variables.

    Args:
        search: the `RankingSearch`.
        model: the compiled model with masks, all of whose variables it changes.

    Raises:
        ConfigError: the level at which candidates are judged cannot be reached.
    """

    def __init__(self, search, model):
        self.search = search
        self.model = model
        pruning = search.pruning
        self.prunable = Prunable(pruning.params, pruning.selects, model.graph())
        self.scored_slices = self.prunable.scored_slices()
        self.spreads = self.prunable.spreads(self.scored_slices)
        given = search.options.max_pruning
        self.level = pruning.params.target if given is None else given
        self._require_level()
        self.variables = [*model.variables, *built_optimizer(model).variables]
        self.values = [np.array(keras.ops.convert_to_numpy(v)) for v in self.variables]
        self.known = {}

    def __call__(self, ranking):
        try:
            keep = self.prunable.reach(
                self.level, self.prunable.ranked(self.scored_slices, ranking)
            )
        except ConfigError:  # within a hair of the level that can be reached at most
            return -math.inf
        key = keep.tobytes()
        if key not in self.known:
            self.known[key] = -self._loss(keep)
        return self.known[key]

    def _loss(self, keep):
        """Return the loss of a copy of the model that has been pruned and trained for a while."""
        for variable, value in zip(self.variables, self.values, strict=True):
            variable.assign(np.array(value))  # a copy: on JAX, a step may overwrite its input
        set_masks(self.prunable.graph, self.prunable.coupling, keep)
        training = self.search.training
        for step in range(self.search.options.train_steps):
            inputs, targets, weights = training[step % len(training)]
            self.model.train_on_batch(self._packed(inputs), targets, weights)
        losses = [
            self.model.test_on_batch(self._packed(inputs), targets, weights, return_dict=True)
            for inputs, targets, weights in self.search.held_out
        ]
        samples = [len(inputs[0]) for inputs, _, _ in self.search.held_out]
        return float(np.average([each["loss"] for each in losses], weights=samples))

    def _packed(self, arrays):
        return keras.tree.pack_sequence_as(self.model.input, arrays)

    def _require_level(self):
        identity = self.prunable.ranked(self.scored_slices, {})
        removed = self.prunable.removed(self.prunable.keep(HIGHEST_LEVEL, identity))
        if removed < self.level:
            params = self.search.pruning.params
            raise ConfigError(
                "Expected `legr_params.max_pruning` to be a level that can be reached: without the "
                f"channels that can go, the model has {removed:.1%} fewer {params.quantity}. "
                f"Received: max_pruning={self.level}"
            )


def _needed(received):
    return (
        "Expected labelled data for `interlayer_ranking_type` 'learned_ranking': "
        "`compress_model(model, config, data=...)` with at least two batches `(inputs, targets)`, "
        f"of which one judges what the others train. {received}. With `load_ranking_coeffs_path` "
        "nothing is learned and no labels are needed."
    )
