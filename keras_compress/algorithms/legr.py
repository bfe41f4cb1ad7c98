"""LeGR: what makes the scores of filters comparable over layers, learned by evolution.

A *ranking* is a dict `{layer: (scale, shift)}`. The filters of a layer take part in the one global
ranking with

    scale * score + shift

where `score` is what `filter_importance` gives, not normalized. The identity is (1, 0) throughout.

Reference: Chin et al., "Towards Efficient Model Compression via Learned Global Ranking"
(arXiv:1904.12368), algorithm 1; Real et al., "Regularized Evolution for Image Classifier
Architecture Search" (arXiv:1802.01548) for the ageing.
"""

import collections
import json
import math
import numbers
import pathlib

import numpy as np

from keras_compress.options import ConfigError, Problem, check_file_path, nearest
from keras_compress.whole_files import replacing

IDENTITY = (1.0, 0.0)
SAVE_KEY, LOAD_KEY = "save_ranking_coeffs_path", "load_ranking_coeffs_path"


def evolve(spreads, evaluate, options, report=None):
    """Return the fittest ranking that an ageing evolution comes upon, and its fitness.

    The first candidates are random: `scale = exp(N(0, scale_sigma))` and `shift = N(0, spread)`.
    The last of them, number `min(population_size, generations)`, is the identity. Afterwards the
    fittest of `num_samples` random members of the population is mutated in
    `max(1, int(mutate_percent * layers))` layers and replaces the oldest member:

        scale <- scale * exp(N(0, scale_sigma * (1 - generation / (1.25 * generations))))
        shift <- shift + N(0, spread)

    One generator, seeded once with `random_seed`, draws everything.

    Args:
        spreads: {layer: standard deviation of its filters' scores}, not empty.
        evaluate: function `ranking -> fitness`, a number; one that is not finite never wins.
        options: the `LegrParams`.
        report: function `(generation, fitness, highest fitness so far)`, called after each.

    Raises:
        ValueError: no candidate has a finite fitness.
    """
    random = np.random.default_rng(options.random_seed)
    population = collections.deque(maxlen=options.population_size)  # the oldest first
    best, highest = None, -math.inf
    for generation in range(options.generations):
        ranking = _candidate(generation, population, spreads, options, random)
        fitness = float(evaluate(ranking))
        if not math.isfinite(fitness):
            fitness = -math.inf
        population.append((fitness, ranking))
        if fitness > highest:
            best, highest = ranking, fitness
        if report is not None:
            report(generation, fitness, highest)
    if best is None:
        raise ValueError(
            "Expected a candidate with a finite loss. Received: NaN or infinity for each of "
            f"{options.generations}. Check the data, or lower the learning rate."
        )
    return best, highest


def _candidate(generation, population, spreads, options, random):
    identity = min(options.population_size, options.generations) - 1
    if generation < identity:
        return _mutated(dict.fromkeys(spreads, IDENTITY), spreads, options.scale_sigma, random)
    if generation == identity:
        return dict.fromkeys(spreads, IDENTITY)
    drawn = random.integers(len(population), size=options.num_samples)
    _, parent = max((population[index] for index in drawn), key=lambda member: member[0])
    count = max(1, int(options.mutate_percent * len(spreads)))
    names = list(spreads)
    chosen = {names[i]: spreads[names[i]] for i in random.permutation(len(names))[:count]}
    shrunk = 1 - generation / (1.25 * options.generations)
    return _mutated(parent, chosen, options.scale_sigma * shrunk, random)


def _mutated(ranking, spreads, sigma, random):
    """Change the layers in `spreads` at random."""
    changed = {
        layer: (
            ranking[layer][0] * math.exp(random.normal(0, sigma)),
            ranking[layer][1] + random.normal(0, spread),
        )
        for layer, spread in spreads.items()
    }
    return ranking | changed


def check_save_path(path):
    """Raise a `ConfigError` unless a ranking can be written to a path."""
    check_file_path(path, SAVE_KEY)


def write_ranking(path, ranking):
    """Write a ranking as JSON `{layer: [scale, shift]}`, NNCF's layout; whole or not at all."""
    check_save_path(path)
    target = pathlib.Path(path)
    text = json.dumps({layer: list(pair) for layer, pair in ranking.items()}, indent=2)
    with replacing(target) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def read_ranking(path, layers):
    """Return the ranking that a file holds.

    Args:
        path: a JSON file `{layer: [scale, shift]}`, as `write_ranking` and NNCF write it.
        layers: names of the layers that a ranking is needed for.

    Raises:
        ConfigError: the file cannot be read or is no such JSON, layers are missing or unknown, or
            an entry is not two finite numbers.
    """
    layers = list(layers)
    try:
        found = json.loads(pathlib.Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"Expected `{LOAD_KEY}` to name a JSON file that can be read: {reason}. "
            f"Received: {LOAD_KEY}={str(path)!r}"
        ) from None
    if not isinstance(found, dict):
        raise ConfigError(
            f"{path}: expected a JSON object {{layer: [scale, shift]}}. "
            f"Received: a {type(found).__name__}"
        )
    problems = [*_names_wrong(found, layers), *_numbers_wrong(found)]
    if problems:
        raise ConfigError([Problem((str(path), *where), text) for where, text in problems])
    return {layer: tuple(map(float, found[layer])) for layer in layers}


def _names_wrong(found, layers):
    missing = [name for name in layers if name not in found]
    if missing:
        yield (), f"expected an entry for every layer that can be pruned. Missing: {missing}"
    for name in sorted(set(found) - set(layers)):
        near = nearest(name, layers) or f" Expected one of: {', '.join(layers)}."
        yield (name,), f"the model has no layer of that name that can be pruned.{near}"


def _numbers_wrong(found):
    for name, pair in found.items():
        if not isinstance(pair, list) or len(pair) != 2 or not all(map(_is_finite, pair)):
            yield (name,), f"expected two finite numbers [scale, shift]. Received: {pair!r}"


def _is_finite(value):
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return is_number and math.isfinite(value)
