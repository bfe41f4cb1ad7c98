"""Filter pruning: whole filters taken away."""

from typing import ClassVar, Literal

import pydantic

from keras_compress.algorithms.base import Algorithm, Initializer, check_scopes
from keras_compress.algorithms.pruning_plan import (
    Prunable,
    kept_by_masks,
    pruning_plan,
    set_masks,
)
from keras_compress.options import Flag, Options, Text, integer, number, option
from keras_compress.schedules import SCHEDULES, Schedule

TARGETS = {
    "pruning_target": "prunable channels",
    "pruning_flops_target": "FLOPs",
    "pruning_parameters_target": "parameters",
    "pruning_latency_target": "latency",
}


class LegrParams(Options):
    """The evolution that learns a global ranking (LeGR)."""

    generations: integer(1) = option(400, "Generations.")
    train_steps: integer(0) = option(200, "Training steps per candidate.")
    max_pruning: number(0, below=1) | None = option(
        None, "Pruning level at which candidates are judged; the target where it is not given."
    )
    random_seed: integer(0) = option(42, "Seed.")
    population_size: integer(1) = option(64, "Candidates kept.")
    num_samples: integer(1) = option(16, "Candidates in one tournament.")
    mutate_percent: number(0, 1) = option(0.1, "Fraction of layers that a mutation changes.")
    scale_sigma: number(0) = option(1, "Spread of the random factors.")


class FilterPruningParams(Options):
    """What is pruned, how much and when."""

    filter_importance: Literal[
        "L2", "L1", "geometric_median", "batch_norm_scale", "taylor", "random"
    ] = option("L2", "Score of a filter. Beyond NNCF: batch_norm_scale, taylor, random.")
    pruning_target: number(0, below=1) = option(0.5, "Final fraction of filters to take away.")
    pruning_flops_target: number(0, below=1) | None = option(
        None, "Fraction of FLOPs to take away, instead of pruning_target."
    )
    pruning_parameters_target: number(0, below=1) | None = option(
        None, "Fraction of parameters to take away, instead of pruning_target. Extension."
    )
    pruning_latency_target: number(0, below=1) | None = option(
        None,
        "Fraction to take away of the time that the float model's IR needs on this machine's CPU, "
        "instead of pruning_target. Extension.",
    )
    pruning_steps: integer(1) = option(100, "Epochs of the ramp.")
    num_init_steps: integer(0) = option(0, "Epochs before pruning begins.")
    schedule: Literal["exponential", "exponential_with_bias", "baseline"] = option(
        "exponential", "Course of the pruning level."
    )
    all_weights: Flag = option(
        False, "true: one ranking over all layers; false: one in every group of layers."
    )
    round_to: integer(1) = option(
        8, "Channels that stay in a group come in multiples of this number. Extension."
    )
    random_seed: integer(0) = option(42, "Seed of the `random` importance. Extension.")
    prune_first_conv: Flag = option(False, "Whether the first convolutions are pruned.")
    prune_downsample_convs: Flag = option(False, "Whether strided convolutions are pruned.")
    prune_batch_norms: Flag = option(
        True, "Whether masks silence the batch normalization of a filter before it is removed."
    )
    interlayer_ranking_type: Literal["unweighted_ranking", "learned_ranking"] = option(
        "unweighted_ranking", "learned_ranking: LeGR."
    )
    legr_params: LegrParams = option(LegrParams(), "Options of LeGR.")
    save_ranking_coeffs_path: Text | None = option(None, "File to write LeGR's result to.")
    load_ranking_coeffs_path: Text | None = option(
        None, "File with a result of LeGR, which is then not run."
    )

    @property
    def target_key(self) -> str:
        """The key that says how much goes."""
        return next(iter(self._given_targets), "pruning_target")

    @property
    def _given_targets(self) -> list[str]:
        written = [key for key in TARGETS if key in self.model_fields_set]
        return [key for key in written if getattr(self, key) is not None]

    @property
    def target(self) -> float:
        """How much goes in the end: a fraction of `quantity`."""
        return getattr(self, self.target_key)

    @property
    def quantity(self) -> str:
        """What the target is a fraction of."""
        return TARGETS[self.target_key]

    @property
    def is_global(self) -> bool:
        """Whether one ranking goes over all groups."""
        return self.all_weights or self.is_learned

    @property
    def is_learned(self) -> bool:
        """Whether layers are made comparable by a learned ranking."""
        return self.interlayer_ranking_type == "learned_ranking"

    @property
    def is_to_learn(self) -> bool:
        """Whether that ranking must be learned first."""
        return self.is_learned and self.load_ranking_coeffs_path is None

    def prunes(self, key: str) -> bool:
        """Says whether a kind of convolution is pruned; with a learned ranking by default."""
        return getattr(self, key) or (self.is_learned and key not in self.model_fields_set)

    @pydantic.model_validator(mode="after")
    def _check_ranking(self):
        if not self.is_learned:
            for key in ("save_ranking_coeffs_path", "load_ranking_coeffs_path"):
                if getattr(self, key) is not None:
                    raise ValueError(
                        f"`{key}` belongs to `interlayer_ranking_type` 'learned_ranking'. "
                        f"Received: interlayer_ranking_type={self.interlayer_ranking_type!r}"
                    )
            return self
        if self.filter_importance == "taylor":
            raise ValueError(
                "expected an importance that is known before training, for a learned ranking. "
                f"Received: filter_importance={self.filter_importance!r}"
            )
        if "all_weights" in self.model_fields_set and not self.all_weights:
            raise ValueError("a learned ranking goes over all layers. Received: all_weights=False")
        return self

    @pydantic.model_validator(mode="after")
    def _check_one_target(self):
        given = self._given_targets
        if len(given) > 1:
            values = ", ".join(f"{key}={getattr(self, key)}" for key in given)
            raise ValueError(f"expected either {' or '.join(given)}. Received: {values}")
        return self


class FilterPruning(Algorithm):
    """Pruning of the least important filters, together with all that depends on them.

    While training, masks switch filters off, and on again where others became less important.
    `keras_compress.strip` and `keras_compress.shrink` remove what is off. Channels that are joined
    by additions, depthwise convolutions and the like go together; `keras_compress.plan` lists the
    groups.

    Keys beyond NNCF's format: `round_to`, `pruning_parameters_target`, `random_seed` and three
    more values of `filter_importance`.

    Example:

    >>> pruning = FilterPruning(params={"schedule": "baseline", "pruning_target": 0.4})
    >>> pruning.level(0)
    0.4
    """

    name: ClassVar[str] = "filter_pruning"
    adjustable: ClassVar[bool] = True

    pruning_init: number(0, below=1) = option(0.0, "Pruning level to start with.")
    initializer: Initializer = option(Initializer(), "What happens right after filters are masked.")
    params: FilterPruningParams = option(FilterPruningParams(), "What, how much and when.")
    compression_lr_multiplier: number(0) | None = option(
        None,
        "Accepted for the shared format.",
        status="ignored",
        reason="filter pruning trains no parameters of its own",
    )

    @property
    def schedule(self) -> Schedule:
        """The course of the level, over epochs."""
        params = self.params
        return SCHEDULES[params.schedule](
            init=self.pruning_init,
            target=params.target,
            num_init_steps=params.num_init_steps,
            pruning_steps=params.pruning_steps,
        )

    def level(self, epoch: int) -> float:
        """Returns the fraction that is gone in an epoch: of filters, or of what has a target."""
        return self.schedule(epoch)

    @property
    def adaptation_samples(self) -> int:
        """Samples that batch normalization adapts to, where filters are masked at once."""
        wanted = self.initializer.batchnorm_adaptation.num_bn_adaptation_samples
        return wanted if self.level(0) > 0 else 0

    @property
    def samples_needed(self) -> int:
        """Samples for batch-norm adaptation."""
        return self.adaptation_samples

    def plan(self, graph, config, with_data):
        """Returns the masks, the groups of channels, and what will be left of the model."""
        return pruning_plan(self, graph, config, with_data)

    def start(self, model, batches) -> None:
        """Takes up a ranking that is in a file, and sets the masks of epoch 0."""
        if self.params.is_learned and not self.params.is_to_learn:
            prunable = self.prunable(model)
            prunable.load_ranking()
            self.set_ranking(model, prunable.ranking)
        self.begin_epoch(model, 0)

    def set_ranking(self, model, ranking) -> None:
        """Keeps a ranking `{layer: (scale, shift)}` in a compressed model, for all later epochs."""
        ranking = {layer: list(pair) for layer, pair in ranking.items()}
        model.progress.setdefault(self.name, {})["ranking"] = ranking

    @property
    def has_latency_target(self) -> bool:
        """Whether the target is the latency of the IR."""
        return self.params.quantity == "latency"

    def set_latency(self, model, measured: dict[str, float]) -> None:
        """Keeps what `find_latency_level` measured in the model: a `LatencyTarget` as a dict."""
        model.progress.setdefault(self.name, {})["latency"] = measured

    @property
    def final_rate(self) -> float:
        """The level in the end."""
        return self.params.target

    def set_level(self, model, level: float) -> None:
        """Sets the masks to a level, by the weights as they are now."""
        prunable = self.prunable(model)
        keep = prunable.reach(level, prunable.scores())
        set_masks(prunable.graph, prunable.coupling, keep)

    def begin_epoch(self, model, epoch: int) -> None:
        """Sets the masks of an epoch; the level never falls behind one that was reached."""
        reached = model.progress.get(self.name, {})
        if reached.get("held"):
            return
        if reached.get("frozen") and reached["epoch"] >= epoch:
            return
        schedule = self.schedule
        level = max(schedule(epoch), reached.get("level", 0.0))
        if level > 0 and not (reached.get("level") == level and schedule.frozen(epoch)):
            self.set_level(model, level)
        frozen = schedule.frozen(epoch + 1)
        now = {"epoch": epoch, "level": level, "frozen": frozen}
        model.progress[self.name] = reached | now

    def masks_are_final(self, model) -> bool:
        """Says whether the schedule is at its end."""
        return model.progress.get(self.name, {}).get("frozen", False)

    def statistics(self, model) -> dict[str, float]:
        """Returns how much is left of filters, parameters and FLOPs, and the level reached."""
        sizes = self.sizes(model)
        figures = {f"{size.what} left".replace(" ", "_"): size.now for size in sizes}
        quantity = self.params.quantity
        quantity = "prunable channels" if quantity == "latency" else quantity
        level = next(size.level for size in sizes if size.what == quantity)
        return {**figures, "pruning_level": level}

    def sizes(self, model):
        """Returns the `SizeEntry`s of a compressed model: full, current, level."""
        prunable = self.prunable(model)
        return prunable.sizes(kept_by_masks(prunable.graph, prunable.coupling))

    def prunable(self, model) -> Prunable:
        """Returns the groups of a compressed model, measured against the model it was made from."""
        plan = model.plan
        full = {size["what"]: size["full"] for size in plan["sizes"]}
        full |= {f"channels of {group['name']}": group["channels"] for group in plan["groups"]}
        ranking = model.progress.get(self.name, {}).get("ranking")
        measured = model.progress.get(self.name, {}).get("latency")
        if measured:
            full["latency level"] = measured["level"]
        return Prunable(self.params, self.selects, model.graph(), full, ranking)

    def check_scopes(self, graph) -> None:
        """Makes sure that every scope entry matches a node."""
        if self.validate_scopes:
            names = [node.name for node in graph.nodes]
            check_scopes(self.scope_lists(), names)

    @pydantic.model_validator(mode="after")
    def _check_course(self):
        if self.pruning_init > self.params.target:
            raise ValueError(
                "expected a start below the target. Received: "
                f"pruning_init={self.pruning_init}, {self.params.target_key}={self.params.target}"
            )
        if self.params.filter_importance == "taylor" and self.level(0) > 0:
            raise ValueError(
                "expected a schedule that begins with training, since `taylor` sums up gradients: "
                "`num_init_steps` of at least 1, or an exponential schedule with `pruning_init` 0. "
                f"Received: a level of {self.level(0)} in epoch 0"
            )
        return self
