"""LeGR: the search for a ranking on a small network, its use, and what it needs."""

import json

import keras
import numpy as np
import pytest
from backend_helpers import numpy

import keras_compress as kc
from keras_compress.algorithms.legr import IDENTITY, write_ranking
from keras_compress.algorithms.pruning_plan import Prunable
from keras_compress.graph.trace import trace
from keras_compress.training.legr import Judge, RankingSearch

# A network of two branches. `essential` has one large filter and small ones, which the head makes
# up for; the head hardly reads what comes from `useless`.

CLASSES = 8


def network(dropout=0.0, ready=True):
    random = np.random.default_rng(0)
    inputs = keras.Input((4, 4, CLASSES), name="image")
    branches = []
    for name in ("essential", "useless"):
        x = keras.layers.Conv2D(CLASSES, 1, use_bias=False, name=name)(inputs)
        branches.append(keras.layers.GlobalAveragePooling2D(name=f"{name}_pool")(x))
    x = keras.layers.Dropout(dropout, seed=3, name="drop")(
        keras.layers.Concatenate(name="both")(branches)
    )
    model = keras.Model(inputs, keras.layers.Dense(CLASSES, name="head")(x), name="network")
    scales = np.array([1.0] + [0.3] * (CLASSES - 1))
    useless = random.normal(size=(CLASSES, CLASSES))
    useless /= np.linalg.norm(useless, axis=0) / np.linspace(0.95, 1.05, CLASSES)
    head = [np.diag(4 / scales), 1e-3 * random.normal(size=(CLASSES, CLASSES))]
    model.get_layer("essential").kernel.assign(np.diag(scales)[None, None])
    model.get_layer("useless").kernel.assign(useless[None, None])
    model.get_layer("head").kernel.assign(np.concatenate(head))
    return compiled(model) if ready else model


def compiled(model, optimizer=None):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer or keras.optimizers.Adam(1e-3), loss)
    return model


def samples(count=320, seed=0):
    random = np.random.default_rng(seed)
    labels = random.integers(0, CLASSES, count)
    images = random.normal(0, 0.3, (count, 4, 4, CLASSES)) + np.eye(CLASSES)[labels][:, None, None]
    return images.astype("float32"), labels


def configuration(legr=None, learned=True, init=0.0, **params):
    how = {"interlayer_ranking_type": "learned_ranking"} if learned else {"all_weights": True}
    params = {"pruning_target": 0.4, "schedule": "baseline", "round_to": 1, **how, **params}
    if learned:
        params["legr_params"] = {"generations": 10, "train_steps": 2, **(legr or {})}
    return {
        "compression": {
            "algorithm": "filter_pruning",
            "pruning_init": init,
            "params": params,
            "initializer": {"batchnorm_adaptation": {"num_bn_adaptation_samples": 0}},
        }
    }


def compress(config, model=None, data=None):
    data = samples() if data is None else data
    return kc.compress_model(model or network(), config, data=data, verbose=False)


def ranking_of(model):
    return model.progress["filter_pruning"]["ranking"]


def masks(model):
    return {n: model.get_layer(n).kernel_transforms[0].mask(-1) for n in ("essential", "useless")}


def loss_of(model):
    return compiled(model).evaluate(*samples(seed=1), verbose=0)


def test_the_learned_ranking_spares_the_essential_layer(tmp_path):
    whole = network().evaluate(*samples(seed=1), verbose=0)
    unweighted = compress(configuration(learned=False, prune_first_conv=True))
    path = tmp_path / "identity.json"
    write_ranking(path, dict.fromkeys(("essential", "useless"), IDENTITY))
    identity = compress(configuration(load_ranking_coeffs_path=str(path)))
    learned = compress(configuration())
    for model in (unweighted, identity):
        assert masks(model)["essential"].sum() < CLASSES and masks(model)["useless"].sum() > 1
        assert loss_of(model) > 5 * whole
    np.testing.assert_array_equal(masks(learned)["essential"], np.ones(CLASSES))
    assert masks(learned)["useless"].sum() == 1
    assert loss_of(learned) < 1.1 * whole
    assert set(ranking_of(learned)) == {"essential", "useless"}


def test_the_search_leaves_no_trace_but_the_ranking():
    model = network(dropout=0.2)
    before = [np.array(numpy(v)) for v in [*model.variables, *model.optimizer.variables]]
    compressed = compress(configuration(), model)
    after = [numpy(v) for v in [*model.variables, *model.optimizer.variables]]
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(old, new)
    for name in ("essential", "useless", "head"):
        pairs = zip(
            model.get_layer(name).weights, compressed.get_layer(name).plain_weights, strict=True
        )
        for old, new in pairs:
            np.testing.assert_array_equal(numpy(old), numpy(new))
    assert not compressed.compiled


def search_and_judge(model, pruning=None, **legr):
    config = kc.Config.load(pruning or configuration(legr))
    graph = trace(model)
    search = RankingSearch.of(config, model, samples(), graph.inputs)
    candidate = kc.compress_model(
        model, configuration(learned=False, prune_first_conv=True), verbose=False
    )
    candidate.compile(**search.compile_arguments)
    return search, Judge(search, candidate)


def test_a_fitness_does_not_depend_on_what_was_judged_before():
    search, judge = search_and_judge(network(dropout=0.3), train_steps=5)
    good = {"essential": (10.0, 0.0), "useless": (1.0, 0.0)}
    bad = {"essential": (0.01, 0.0), "useless": (1.0, 0.0)}
    first = judge(good)
    assert judge(bad) < first
    assert len(judge.known) == 2 and judge({**good, "useless": (0.9, 0.0)}) == first
    assert len(judge.known) == 2  # the same channels stay
    judge.known.clear()
    assert judge(good) == first
    assert len(search.held_out) == 2 and len(search.training) == 8


def test_training_steps_and_loss_are_those_of_the_user():
    """Judged by hand: the same pruning, steps and loss on a model of its own."""
    search, judge = search_and_judge(network(), train_steps=3)
    ranking = {"essential": (0.5, 0.1), "useless": (1.0, 0.0)}
    fitness = judge(ranking)
    twin = compiled(compress(configuration(learned=False, prune_first_conv=True)))
    for name, mask in masks(judge.model).items():
        twin.get_layer(name).kernel_transforms[0].set_mask(-1, mask)
    x, y = samples()
    for step in range(3):
        twin.train_on_batch(x[32 * step : 32 * step + 32], y[32 * step : 32 * step + 32])
    held_out = np.concatenate([np.arange(128, 160), np.arange(288, 320)])
    expected = twin.evaluate(x[held_out], y[held_out], verbose=0)
    assert fitness == pytest.approx(-expected, rel=1e-5)
    assert np.concatenate([b[0][0] for b in search.held_out]).shape == (64, 4, 4, CLASSES)


def test_every_candidate_loses_what_is_asked_for():
    """No ranking may win by pruning less: channels, FLOPs or parameters really go."""
    for key in ("pruning_target", "pruning_flops_target", "pruning_parameters_target"):
        config = configuration({"train_steps": 0}, **{key: 0.4})
        if key != "pruning_target":
            del config["compression"]["params"]["pruning_target"]
        _, judge = search_and_judge(network(), config)
        for scale in (0.01, 1.0, 3.0, 3.4, 100.0):
            judge({"essential": (scale, 0.0), "useless": (1.0, 0.0)})
        removed = [judge.prunable.removed(np.frombuffer(keep, bool)) for keep in judge.known]
        assert len(removed) > 2 and min(removed) >= 0.4 and max(removed) < 0.5


def test_max_pruning_is_the_level_of_candidates():
    _, judge = search_and_judge(network(), train_steps=0, max_pruning=0.7)
    judge({})
    (keep,) = judge.known
    assert 0.7 <= judge.prunable.removed(np.frombuffer(keep, bool)) < 0.8
    with pytest.raises(kc.ConfigError, match=r"has 87.5% fewer prunable channels.*=0.9"):
        compress(configuration({"max_pruning": 0.9}))


def test_scores_are_neither_normalized_nor_forgotten():
    graph = trace(network())
    options = kc.Config.load(configuration()).algorithms[0]
    prunable = Prunable(options.params, options.selects, graph, ranking={"essential": (2.0, -0.5)})
    scores = dict(zip([g.name for g in prunable.groups], prunable.scores(), strict=True))
    np.testing.assert_allclose(scores["essential"], 2 * np.array([1] + [0.3] * 7) - 0.5, rtol=1e-6)
    np.testing.assert_allclose(scores["useless"], np.linspace(0.95, 1.05, CLASSES), rtol=1e-6)
    spreads = prunable.spreads(prunable.scored_slices())
    assert spreads["essential"] == pytest.approx(np.std([1] + [0.3] * 7))


def test_shifts_count_once_for_each_producer_of_a_group():
    inputs = keras.Input((4, 4, 3))
    one, other = (keras.layers.Conv2D(4, 1, name=name)(inputs) for name in ("one", "other"))
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.Add()([one, other]))
    model = keras.Model(inputs, keras.layers.Dense(2, name="head")(x))
    options = kc.Config.load(configuration()).algorithms[0]
    plain = Prunable(options.params, options.selects, trace(model))
    slices = {each.layer: scores for each, scores in plain.scored_slices()}
    (scores,) = plain.ranked(plain.scored_slices(), {"one": (2.0, 1.0), "other": (3.0, 10.0)})
    np.testing.assert_allclose(scores, 2 * slices["one"] + 1 + 3 * slices["other"] + 10)
    assert set(plain.spreads(plain.scored_slices())) == {"one", "other"}


def test_a_ranking_is_written_and_read(tmp_path):
    path = tmp_path / "ranking.json"
    learned = compress(configuration(save_ranking_coeffs_path=str(path)))
    assert json.loads(path.read_text()) == ranking_of(learned)
    uncompiled = network(ready=False)
    config = configuration(load_ranking_coeffs_path=str(path))
    loaded = kc.compress_model(uncompiled, config, verbose=False)
    assert ranking_of(loaded) == ranking_of(learned)
    for name, mask in masks(loaded).items():
        np.testing.assert_array_equal(mask, masks(learned)[name])
    decided = kc.plan(uncompiled, config)
    assert {g.name: g.kept for g in decided.groups}["essential"] == CLASSES
    assert "as important as they are now" in decided.notes[0]
    assert "before one is learned" in kc.plan(network(), configuration()).notes[0]


def test_a_file_for_another_model_is_refused_before_any_work(tmp_path):
    path = tmp_path / "ranking.json"
    path.write_text('{"essential": [1, 0], "uselass": [1, 0]}')
    with pytest.raises(kc.ConfigError, match="Missing: .'useless'.(.|\n)*Did you mean 'useless'"):
        compress(configuration(load_ranking_coeffs_path=str(path)))


def test_saving_and_resuming_keep_the_ranking(tmp_path):
    config = configuration(schedule="exponential", pruning_steps=4)
    model = compiled(compress(config))
    assert masks(model)["useless"].sum() == CLASSES
    callbacks = [kc.callbacks.Compress()]
    model.fit(*samples(), epochs=2, verbose=0, callbacks=callbacks)
    ranking = ranking_of(model)
    model.save(tmp_path / "model.keras")
    resumed = keras.models.load_model(tmp_path / "model.keras")
    assert ranking_of(resumed) == ranking
    for each in (model, resumed):
        each.fit(*samples(), epochs=5, initial_epoch=2, verbose=0, callbacks=callbacks)
        assert ranking_of(each) == ranking
        np.testing.assert_array_equal(masks(each)["essential"], np.ones(CLASSES))
        assert masks(each)["useless"].sum() == 1


class Rows(keras.utils.PyDataset):
    def __len__(self):
        return 5

    def __getitem__(self, index):
        x, y = samples(16, seed=index)
        return {"image": x}, y, np.ones(16, "float32")


def test_other_kinds_of_data_and_losses():
    """Dictionaries, sample weights, a loss that is a function, batches of a generator."""
    x, y = samples(160)
    model = network()
    model.compile("sgd", lambda t, p: keras.losses.sparse_categorical_crossentropy(t, p, True))
    legr = {"generations": 2, "train_steps": 3}
    batches = ((x[i : i + 32], y[i : i + 32]) for i in range(0, 160, 32))
    for data in (Rows(), batches):
        assert set(ranking_of(compress(configuration(legr), model, data))) == {
            "essential",
            "useless",
        }


def test_several_outputs_with_weighted_losses():
    inputs = {"b": keras.Input((6,), name="b"), "a": keras.Input((4,), name="a")}
    x = keras.layers.Dense(8, activation="relu", name="hidden")(inputs["a"])
    z = keras.layers.Dense(8, activation="relu", name="other")(inputs["b"])
    both = keras.layers.Concatenate()([x, z])
    outputs = {n: keras.layers.Dense(2, name=n)(both) for n in ("left", "right")}
    model = keras.Model(inputs, outputs)
    weights = {"left": 0.5, "right": 2.0}
    model.compile("adam", loss={"left": "mse", "right": "mae"}, loss_weights=weights)
    random = np.random.default_rng(0)
    x = {"a": random.normal(size=(64, 4)), "b": random.normal(size=(64, 6))}
    y = {name: random.normal(size=(64, 2)) for name in ("left", "right")}
    search = RankingSearch.of(kc.Config.load(configuration()), model, (x, y), trace(model).inputs)
    assert search.compile_arguments["loss_weights"] == weights
    assert search.compile_arguments["optimizer"] is not model.optimizer
    assert set(ranking_of(compress(configuration(), model, (x, y)))) == {"hidden", "other"}


def test_no_more_batches_than_needed_are_read():
    taken = []

    def endless():
        while True:
            taken.append(1)
            yield samples(4)

    model = network()
    graph = trace(model)
    for steps, count in ((0, 50), (3, 50), (100, 125)):
        taken.clear()
        config = kc.Config.load(configuration({"train_steps": steps}))
        search = RankingSearch.of(config, model, endless(), graph.inputs)
        assert len(taken) == count
        held_out = count if steps == 0 else count // 5
        assert len(search.held_out) == held_out
        assert len(search.training) == count - held_out


def test_what_learning_needs():
    x, y = samples(64)
    plain = network(ready=False)
    with pytest.raises(ValueError, match="compiled with a loss.*Received: model 'network' without"):
        compress(configuration(), plain)
    plain.compile("sgd")
    with pytest.raises(ValueError, match="compiled with a loss"):
        compress(configuration(), plain)
    with pytest.raises(ValueError, match="Expected labelled data for .*Received: data=None"):
        kc.compress_model(network(), configuration(), verbose=False)
    for data in (x, iter([x, x]), [(x, None), (x, None)]):
        with pytest.raises(ValueError, match="Expected labelled data: batches.*Received: batch 0"):
            compress(configuration(), data=data)
    with pytest.raises(ValueError, match="at least two batches.*1 batch, which cannot be split"):
        compress(configuration(), data=(x[:32], y[:32]))
    assert compress(configuration({"train_steps": 0}), data=(x[:32], y[:32])) is not None
    with pytest.raises(ValueError, match="at least one batch"):
        compress(configuration(), data=[])
    with pytest.raises(kc.ConfigError, match="save_ranking_coeffs_path.*no such folder"):
        compress(configuration(save_ranking_coeffs_path="/no/such/folder/r.json"))


def test_a_search_in_vain():
    x, y = samples()
    model = network()
    model.compile("sgd", lambda t, p: keras.ops.mean(p) * np.nan)
    with pytest.raises(ValueError, match="Expected a candidate with a finite loss"):
        compress(configuration(), model, (x, y))


def test_contradictions_in_the_configuration():
    for key in ("save_ranking_coeffs_path", "load_ranking_coeffs_path"):
        with pytest.raises(kc.ConfigError, match=f"`{key}` belongs to"):
            kc.Config.load(configuration(learned=False, **{key: "r.json"}))
    with pytest.raises(kc.ConfigError, match="known before training.*'taylor'"):
        kc.Config.load(configuration(filter_importance="taylor", num_init_steps=1))
    with pytest.raises(kc.ConfigError, match="goes over all layers. Received: all_weights=False"):
        kc.Config.load(configuration(all_weights=False))


def test_first_and_strided_convolutions_are_pruned_by_default():
    params = kc.Config.load(configuration()).algorithms[0].params
    assert params.prunes("prune_first_conv") and params.prunes("prune_downsample_convs")
    params = kc.Config.load(configuration(prune_first_conv=False)).algorithms[0].params
    assert not params.prunes("prune_first_conv") and params.prunes("prune_downsample_convs")
    params = kc.Config.load(configuration(learned=False)).algorithms[0].params
    assert not params.prunes("prune_first_conv")


def test_a_ranking_under_quantization():
    config = configuration()
    config["compression"] = [config["compression"], {"algorithm": "quantization"}]
    model = compress(config)
    assert masks(model)["useless"].sum() == 1 and all(q.calibrated for q in model.quantizers())


def test_progress_is_shown(capsys):
    kc.compress_model(network(), configuration({"generations": 2}), data=samples())
    kc.compress_model(network(), configuration(), data=samples(), verbose=False)
    assert capsys.readouterr().out == ""
