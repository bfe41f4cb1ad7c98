"""LeGR: the evolution on known optima, and files of coefficients."""

import json

import numpy as np
import pytest

import keras_compress as kc
from keras_compress.algorithms.filter_pruning import LegrParams
from keras_compress.algorithms.legr import IDENTITY, evolve, read_ranking, write_ranking

SPREADS = {f"layer_{i}": 0.1 * (i + 1) for i in range(10)}
OPTIMUM = {name: (0.25 * (i + 1), 0.05 * (i - 4)) for i, name in enumerate(SPREADS)}


def distance(ranking):
    """Minus the squared distance to a known optimum, with scales compared by their logarithms."""
    return -sum(
        np.log(ranking[name][0] / scale) ** 2 + ((ranking[name][1] - shift) / SPREADS[name]) ** 2
        for name, (scale, shift) in OPTIMUM.items()
    )


def evolved(fitness=distance, spreads=SPREADS, **options):
    """Return the best ranking, its fitness, and all candidates in order."""
    candidates = []

    def evaluate(ranking):
        candidates.append(ranking)
        return fitness(ranking)

    return *evolve(spreads, evaluate, LegrParams(**options)), candidates


def test_the_evolution_beats_the_identity_and_random_rankings():
    best, highest, candidates = evolved()
    assert len(candidates) == 400 and highest == distance(best) == max(map(distance, candidates))
    _, by_chance, _ = evolved(population_size=400)
    identity = distance(dict.fromkeys(SPREADS, IDENTITY))
    assert highest > 0.6 * by_chance and by_chance > identity  # fitness is negative
    _, by_more_luck, _ = evolved(generations=4000, population_size=4000)
    assert highest > by_more_luck


def test_candidates_differ_and_the_last_random_one_is_the_identity():
    _, _, candidates = evolved(generations=30, population_size=12)
    texts = {json.dumps(candidate) for candidate in candidates}
    assert len(texts) == 30
    assert candidates[11] == dict.fromkeys(SPREADS, IDENTITY)
    assert all(set(candidate) == set(SPREADS) for candidate in candidates)
    assert all(scale > 0 for candidate in candidates for scale, _ in candidate.values())


@pytest.mark.parametrize("generations", [1, 5, 64])
def test_a_short_evolution_has_the_identity_too(generations):
    _, _, candidates = evolved(generations=generations)
    assert candidates[-1] == dict.fromkeys(SPREADS, IDENTITY)
    assert len(candidates) == generations


def test_the_seed_decides_everything():
    first, again, other = (
        evolved(generations=40, population_size=8, random_seed=seed) for seed in (7, 7, 8)
    )
    assert first == again
    assert first[2] != other[2]


def test_the_spread_of_random_rankings():
    _, _, candidates = evolved(generations=2000, population_size=2000, scale_sigma=0.5)
    logarithms = np.log([[c[name][0] for name in SPREADS] for c in candidates[:-1]])
    shifts = np.array([[c[name][1] for name in SPREADS] for c in candidates[:-1]])
    np.testing.assert_allclose(logarithms.std(axis=0), 0.5, rtol=0.06)
    np.testing.assert_allclose(logarithms.mean(axis=0), 0, atol=0.05)
    np.testing.assert_allclose(shifts.std(axis=0), list(SPREADS.values()), rtol=0.06)


def parents_of(candidates, start):
    """Yield (generation, number of layers changed) of mutants against their nearest ancestor."""
    for generation in range(start, len(candidates)):
        changes = [
            [name for name in SPREADS if candidates[generation][name] != earlier[name]]
            for earlier in candidates[:generation]
        ]
        yield generation, min(map(len, changes))


@pytest.mark.parametrize(("percent", "changed"), [(0, 1), (0.1, 1), (0.39, 3), (1, 10)])
def test_a_mutation_changes_a_fraction_of_the_layers_but_one_at_least(percent, changed):
    _, _, candidates = evolved(generations=30, population_size=6, mutate_percent=percent)
    assert {count for _, count in parents_of(candidates, 6)} == {changed}


def test_mutations_shrink():
    spreads = {"only": 0.0}
    options = {"generations": 1000, "population_size": 1, "num_samples": 1}
    _, _, candidates = evolved(lambda ranking: 0.0, spreads, **options)
    steps = np.abs(np.diff(np.log([candidate["only"][0] for candidate in candidates])))
    early, late = steps[:200].mean(), steps[-200:].mean()
    assert late / early == pytest.approx((1 - 0.72) / (1 - 0.08), rel=0.2)


def test_the_oldest_member_is_replaced_not_the_worst():
    """The population forgets the best ranking, which is returned all the same."""
    fitness = iter([1.0, 0.0, 0.0, -1.0, -1.0])
    best, highest, candidates = evolved(
        lambda ranking: next(fitness), generations=5, population_size=3, num_samples=64
    )
    assert highest == 1.0 and best is candidates[0]
    kept = [[c[name] == candidates[0][name] for name in SPREADS] for c in candidates]
    assert sum(kept[3]) == 9  # a mutant of the best one, which it replaces
    assert sum(kept[4]) == 0  # a mutant of one of the other two


def test_candidates_without_a_finite_fitness_never_win():
    fitness = iter([np.nan, np.inf, -np.inf, -5.0, np.nan])
    best, highest, candidates = evolved(lambda ranking: next(fitness), generations=5)
    assert highest == -5.0 and best is candidates[3]
    with pytest.raises(ValueError, match="finite loss. Received: NaN or infinity for each of 5"):
        evolved(lambda ranking: np.nan, generations=5)


def test_every_generation_is_reported():
    reports = []
    fitness = iter([-3.0, -2.0, np.nan, -4.0])
    evolve(
        SPREADS,
        lambda ranking: next(fitness),
        LegrParams(generations=4),
        report=lambda *report: reports.append(report),
    )
    assert reports == [(0, -3.0, -3.0), (1, -2.0, -2.0), (2, -np.inf, -2.0), (3, -4.0, -2.0)]


def test_a_file_of_coefficients(tmp_path):
    path = tmp_path / "ranking.json"
    ranking = {"conv": (1 / 3, -1e-17), "a/b": (2.0, 0.0)}
    path.write_text("old")
    write_ranking(path, ranking)
    assert json.loads(path.read_text()) == {"conv": [1 / 3, -1e-17], "a/b": [2.0, 0.0]}
    assert read_ranking(path, ["conv", "a/b"]) == ranking
    assert [p.name for p in tmp_path.iterdir()] == ["ranking.json"]
    path.write_text('{"conv": [1, 0]}')  # as NNCF writes the identity
    assert read_ranking(path, ["conv"]) == {"conv": (1.0, 0.0)}


def test_files_that_cannot_be_written(tmp_path):
    for path, what in (
        (tmp_path, "it is a folder"),
        (tmp_path / "no" / "r.json", "no such folder"),
    ):
        with pytest.raises(kc.ConfigError, match=f"save_ranking_coeffs_path=.*{what}"):
            write_ranking(path, {})


def test_files_that_cannot_be_read(tmp_path):
    path = tmp_path / "ranking.json"
    with pytest.raises(kc.ConfigError, match="can be read: No such file.*load_ranking_coeffs_path"):
        read_ranking(path, ["conv"])
    path.write_text("{conv: [1, 0]}")
    with pytest.raises(kc.ConfigError, match="can be read: Expecting property name"):
        read_ranking(path, ["conv"])
    path.write_text("[1, 0]")
    with pytest.raises(kc.ConfigError, match="expected a JSON object.*Received: a list"):
        read_ranking(path, ["conv"])


def test_all_problems_of_a_file_are_named(tmp_path):
    path = tmp_path / "ranking.json"
    entries = {"conv_1": [1, 0], "konv_2": [1, 0], "bad": [1], "worse": [True, 0], "text": "ab"}
    path.write_text(json.dumps(entries).replace('"ab"', "[NaN, 0]"))
    with pytest.raises(kc.ConfigError) as caught:
        read_ranking(path, ["conv_1", "conv_2", "conv_3", "bad", "worse", "text"])
    message = str(caught.value)
    assert "5 problems" in message
    assert r"Missing: ['conv_2', 'conv_3']" in message
    assert "konv_2" in message and "Did you mean 'conv_2'" in message
    for received in ("[1]", "[True, 0]", "[nan, 0]"):
        assert f"expected two finite numbers [scale, shift]. Received: {received}" in message
