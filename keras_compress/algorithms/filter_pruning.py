"""Filter pruning: whole filters taken away."""

from typing import ClassVar, Literal

import pydantic

from keras_compress.algorithms.base import Algorithm, Initializer
from keras_compress.options import Flag, Options, Text, integer, number, option


class LegrParams(Options):
    """The evolution that learns a global ranking (LeGR)."""

    generations: integer(1) = option(400, "Generations.")
    train_steps: integer(0) = option(200, "Training steps per candidate.")
    max_pruning: number(0, below=1) = option(0.8, "Pruning level at which candidates are judged.")
    random_seed: integer(0) = option(42, "Seed.")
    population_size: integer(1) = option(64, "Candidates kept.")
    num_samples: integer(1) = option(16, "Candidates in one tournament.")
    mutate_percent: number(0, 1) = option(0.1, "Fraction of layers that a mutation changes.")
    scale_sigma: number(0) = option(1, "Spread of the random factors.")


class FilterPruningParams(Options):
    """What is pruned, how much and when."""

    filter_importance: Literal["L2", "L1", "geometric_median"] = option("L2", "Score of a filter.")
    pruning_target: number(0, below=1) = option(0.5, "Final fraction of filters to take away.")
    pruning_flops_target: number(0, below=1) | None = option(
        None, "Fraction of FLOPs to take away, instead of pruning_target."
    )
    pruning_steps: integer(1) = option(100, "Epochs of the ramp.")
    num_init_steps: integer(0) = option(0, "Epochs before pruning begins.")
    schedule: Literal["exponential", "exponential_with_bias", "baseline"] = option(
        "exponential", "Course of the pruning level."
    )
    all_weights: Flag = option(
        False, "true: one ranking over all layers; false: one in every group of layers."
    )
    prune_first_conv: Flag = option(False, "Whether the first convolutions are pruned.")
    prune_downsample_convs: Flag = option(False, "Whether strided convolutions are pruned.")
    prune_batch_norms: Flag = option(True, "Whether batch normalization follows the filters.")
    interlayer_ranking_type: Literal["unweighted_ranking", "learned_ranking"] = option(
        "unweighted_ranking", "learned_ranking: LeGR."
    )
    legr_params: LegrParams = option(LegrParams(), "Options of LeGR.")
    save_ranking_coeffs_path: Text | None = option(None, "File to write LeGR's result to.")
    load_ranking_coeffs_path: Text | None = option(None, "File with a result of LeGR.")

    @pydantic.model_validator(mode="after")
    def _check_one_target(self):
        if {"pruning_target", "pruning_flops_target"} <= self.model_fields_set:
            raise ValueError(
                "expected either pruning_target or pruning_flops_target. Received: "
                f"pruning_target={self.pruning_target}, "
                f"pruning_flops_target={self.pruning_flops_target}"
            )
        return self


class FilterPruning(Algorithm):
    """Pruning of the least important filters, together with all that depends on them."""

    name: ClassVar[str] = "filter_pruning"
    built: ClassVar[bool] = False
    adjustable: ClassVar[bool] = True

    pruning_init: number(0, below=1) = option(0.0, "Pruning level to start with.")
    initializer: Initializer = option(Initializer(), "What happens right after filters are masked.")
    params: FilterPruningParams = option(FilterPruningParams(), "What, how much and when.")
    compression_lr_multiplier: number(0) | None = option(
        None, "Accepted for the shared format; pruning trains no parameters of its own."
    )
