"""Values that no network should have: NaN, infinity, constants, nothing at all."""

import keras
import numpy as np
import pytest
from backend_helpers import BACKEND

import keras_compress as kc
from keras_compress.data import input_batches, labelled_batches
from keras_compress.export.verify import agreement

QUANTIZATION = {
    "algorithm": "quantization",
    "initializer": {"batchnorm_adaptation": {"num_bn_adaptation_samples": 0}},
}
PRUNING = {
    "algorithm": "filter_pruning",
    "params": {"pruning_target": 0.5, "pruning_steps": 2, "round_to": 1, "prune_first_conv": True},
}
SPARSITY = {
    "algorithm": "magnitude_sparsity",
    "params": {"sparsity_target": 0.5, "sparsity_target_epoch": 2},
}
IN_A_TENSOR = r"NaN or infinity in a tensor .* at '(network/)?"
NOT_FINITE = r"Received: 1 of the \d+ values of 'kernel' of layer 'second' are NaN or infinite"


def points(samples=16, size=6):
    return np.random.default_rng(0).normal(size=(samples, size)).astype("float32")


def network(middle=None, units=4):
    inputs = keras.Input((6,), name="point")
    x = keras.layers.Dense(units, activation="relu", name="first")(inputs)
    x = x if middle is None else middle(x)
    x = keras.layers.Dense(units, activation="relu", name="second")(x)
    return keras.Model(inputs, keras.layers.Dense(2, name="head")(x), name="network")


def compressed(model, *algorithms, data=None):
    return kc.compress_model(model, {"compression": list(algorithms)}, data, verbose=False)


def spoiled(model, value=np.nan, layer="second"):
    """Put a value into the first weight of a layer."""
    kernel = model.get_layer(layer).variables[0]
    values = np.array(keras.ops.convert_to_numpy(kernel))
    values.flat[0] = value
    kernel.assign(values)
    return model


def masks(model):
    return [
        keras.ops.convert_to_numpy(variable).tolist()
        for variable in model.variables
        if "mask" in variable.path
    ]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("data", [None, points()], ids=["no data", "data"])
def test_weights_that_are_no_numbers_are_named_before_anything_is_done(value, data):
    model = spoiled(network(), value)
    started = [PRUNING | {"pruning_init": 0.25}, SPARSITY | {"sparsity_init": 0.25}]
    for algorithm in started:
        with pytest.raises(ValueError, match=NOT_FINITE):
            compressed(model, algorithm, data=data)
    with pytest.raises(ValueError, match=IN_A_TENSOR + "second/"):
        compressed(model, QUANTIZATION, data=data)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "block"])
@pytest.mark.parametrize("mode", ["global", "local"])
def test_a_mask_update_changes_all_masks_or_none(pattern, mode):
    params = {
        "sparsity_target": 0.5,
        "sparsity_pattern": pattern,
        "sparsity_level_setting_mode": mode,
    }
    model = compressed(network(), SPARSITY | {"params": params | {"block_shape": [2, 2]}})
    (algorithm,) = model.config.algorithms
    before = masks(spoiled(model, layer="second"))
    with pytest.raises(ValueError, match=NOT_FINITE):
        algorithm.set_level(model, 0.5)
    assert masks(model) == before


@pytest.mark.parametrize("algorithm", [PRUNING, SPARSITY], ids=["pruning", "sparsity"])
def test_a_training_that_diverges_ends_at_the_next_mask_update(algorithm):
    model = compressed(network(), algorithm)
    model.compile(keras.optimizers.SGD(1e30), "mse", run_eagerly=BACKEND == "tensorflow")
    before = masks(model)
    x = points()
    with pytest.raises(ValueError, match="values of 'kernel' of layer 'first' are NaN or infinite"):
        model.fit(x, x[:, :2], 4, 3, verbose=0, callbacks=[kc.callbacks.Compress()])
    assert masks(model) == before and model.progress["epoch"] == 0


def test_keras_ends_it_before_where_it_is_asked_to():
    model = compressed(network(), PRUNING)
    model.compile(keras.optimizers.SGD(1e30), "mse", run_eagerly=BACKEND == "tensorflow")
    x = points()
    callbacks = [kc.callbacks.Compress(), keras.callbacks.TerminateOnNaN()]
    history = model.fit(x, x[:, :2], 4, 3, verbose=0, callbacks=callbacks)
    assert len(history.epoch) == 1


def test_scores_that_are_no_numbers_are_named():
    params = PRUNING["params"] | {"filter_importance": "taylor"}
    model = compressed(network(), PRUNING | {"params": params})
    (algorithm,) = model.config.algorithms
    scores = [each for each in model.variables if each.path.endswith("score")]
    scores[0].assign(np.full(scores[0].shape, np.nan))
    with pytest.raises(ValueError, match="of layer 'first' are NaN or infinite"):
        algorithm.set_level(model, 0.5)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("kind", ["compressed", "plain"])
def test_weights_that_are_no_numbers_are_not_exported(tmp_path, value, kind):
    model = compressed(network(), QUANTIZATION, data=points()) if kind == "compressed" else None
    model = model or network()
    (tmp_path / "model.xml").write_text("old")
    with pytest.raises(
        ValueError, match=r"weights that are numbers.*1 of the 16 values of '\S*second/kernel'"
    ):
        kc.export(spoiled(model, value), tmp_path / "model.xml")
    assert [path.name for path in tmp_path.iterdir()] == ["model.xml"]
    assert (tmp_path / "model.xml").read_text() == "old"


@keras.saving.register_keras_serializable("fault_tests")
class Capped(keras.layers.Layer):
    """Takes the smaller of its input and a constant that may be infinite."""

    def build(self, input_shape):
        self.cap = self.add_weight(
            name="cap",
            shape=(),
            initializer=keras.initializers.Constant(np.inf),
            trainable=False,
        )

    def call(self, inputs):
        return keras.ops.minimum(inputs, self.cap)


def test_a_constant_may_be_infinite(tmp_path):
    model = network(middle=Capped(name="capped"))
    assert kc.export(model, tmp_path / "model.xml").relative < 1e-5
    model.get_layer("capped").cap.assign(np.nan)
    with pytest.raises(ValueError, match="values of '(network/)?capped/cap' are NaN or infinite"):
        kc.export(model, tmp_path / "model.xml")


@keras.saving.register_keras_serializable("fault_tests")
class Strange(keras.layers.Layer):
    """Makes values of one kind of whatever comes."""

    def __init__(self, kind, **kwargs):
        super().__init__(**kwargs)
        self.kind = kind

    def call(self, inputs):
        zero = inputs * 0.0
        if self.kind == "nan":
            return zero / zero
        return {"zero": zero, "constant": zero + 3.0, "infinite": (zero + 1.0) / zero}[self.kind]

    def get_config(self):
        return super().get_config() | {"kind": self.kind}


ESTIMATORS = ["mixed_min_max", "min_max", "mean_min_max", "threesigma", "percentile"]


@pytest.mark.parametrize("estimator", [*ESTIMATORS, "mean_percentile", "mse"])
@pytest.mark.parametrize("kind", ["zero", "constant"])
@pytest.mark.parametrize("preset", ["performance", "mixed"])
def test_activations_that_never_change_have_a_range_that_holds_them(kind, estimator, preset):
    model = network(middle=Strange(kind, name="strange"))
    ranges = {"range": {"type": estimator, "num_init_samples": 16}}
    initializer = QUANTIZATION["initializer"] | ranges
    algorithm = QUANTIZATION | {"preset": preset, "initializer": initializer}
    model = compressed(model, algorithm, data=points())
    quantizer = next(each for each in model.quantizers() if "strange-" in each.path)
    low, high = quantizer.effective_range()
    value = {"zero": 0.0, "constant": 3.0}[kind]
    assert np.isfinite([low, high]).all() and low <= 0 < high
    rounded = keras.ops.convert_to_numpy(quantizer(np.array([0.0, value], "float32")))
    assert rounded[0] == 0
    assert abs(rounded[1] - value) <= quantizer.step() / 2
    outputs = model.predict(points(), verbose=0)
    assert np.isfinite(outputs).all() and np.ptp(outputs, axis=0).max() == 0


@pytest.mark.parametrize("kind", ["infinite", "nan"])
def test_activations_that_are_no_numbers_are_named(kind):
    model = network(middle=Strange(kind, name="strange"))
    with pytest.raises(Exception, match=IN_A_TENSOR + "strange"):
        compressed(model, QUANTIZATION, data=points())


@pytest.mark.skipif(BACKEND != "tensorflow", reason="other backends wrap what a callback raises")
def test_activations_that_are_no_numbers_in_the_first_batches_are_named():
    model = compressed(network(), QUANTIZATION)
    model.compile("sgd", "mse")
    x = points()
    x[3] = np.nan
    with pytest.raises(ValueError, match=IN_A_TENSOR + "point-"):
        model.fit(x, x[:, :2], 4, verbose=0, callbacks=[kc.callbacks.Compress()])


def test_outputs_that_never_change_have_no_range():
    zeros = np.zeros((4, 2))
    assert agreement("y", zeros, zeros + 1e-30).relative == 0.0
    assert agreement("y", zeros, zeros + 1e-6).relative == np.inf


def test_empty_batches_are_passed_over():
    model, x = network(), points()
    batches = [(x[:0],), (x[:9],), (x[:0],), (x[9:],), (x[:0],)]
    found = list(input_batches(batches, model.inputs, 1000))
    assert [len(arrays[0]) for arrays in found] == [9, 7]
    pairs = [(x[:0], x[:0, :2]), (x[:9], x[:9, :2]), (x[:0], x[:0, :2])]
    assert [len(each[0][0]) for each in labelled_batches(pairs, model.inputs, 10)] == [9]
    ranges = [
        [quantizer.effective_range() for quantizer in each.quantizers()]
        for each in (
            compressed(model, QUANTIZATION, data=batches),
            compressed(model, QUANTIZATION, data=[(x[:9],), (x[9:],)]),
        )
    ]
    np.testing.assert_array_equal(
        np.hstack([*map(np.ravel, sum(ranges[0], ()))]),
        np.hstack([*map(np.ravel, sum(ranges[1], ()))]),
    )
    for nothing in (x[:0], [(x[:0],)], iter([x[:0], x[:0]])):
        with pytest.raises(ValueError, match="at least one sample. Received: data=.*gave none"):
            compressed(model, QUANTIZATION, data=nothing)
    with pytest.raises(ValueError, match="at least one batch"):
        labelled_batches([(x[:0], x[:0, :2])], model.inputs, 10)


def test_a_model_computes_with_no_samples_as_the_original_does():
    model, x = network(), points(samples=0)
    for algorithm in (QUANTIZATION, PRUNING, SPARSITY):
        small = compressed(model, algorithm, data=points() if algorithm is QUANTIZATION else None)
        for each in (small, kc.strip(small)):
            assert tuple(each(x).shape) == tuple(model(x).shape) == (0, 2)


def test_the_last_channel_stays():
    with pytest.raises(kc.ConfigError, match="'first': 1 channels are not more than `round_to`=1"):
        compressed(network(units=1), PRUNING)
    params = PRUNING["params"] | {"pruning_target": 0.99, "schedule": "baseline"}
    for mode in ({}, {"all_weights": True}):
        model = compressed(network(units=3), PRUNING | {"params": params | mode})
        (algorithm,) = model.config.algorithms
        algorithm.set_level(model, 0.99)
        kept = [kc.strip(model).get_layer(name).units for name in ("first", "second")]
        assert min(kept) == 1 if not mode else min(kept) >= 1
    model = compressed(network(units=1), SPARSITY, QUANTIZATION, data=points())
    assert model.get_layer("first").units == 1


def test_a_model_without_weights_stays_as_it_is_or_is_refused():
    inputs = keras.Input((6,), name="point")
    model = keras.Model(inputs, keras.layers.ReLU(name="relu")(inputs), name="network")
    others = ({"algorithm": "rb_sparsity"}, {"algorithm": "binarization"})
    for algorithm in (PRUNING, SPARSITY, *others):
        with pytest.raises(kc.ConfigError, match="Expected a model with .*'network' with 0 "):
            compressed(model, algorithm)
    x = points()
    same = compressed(model, QUANTIZATION, data=x)
    assert same.quantizers() == []
    np.testing.assert_array_equal(same.predict(x, verbose=0), np.maximum(x, 0))


def test_weights_of_an_empty_input_are_refused():
    inputs = keras.Input((0,), name="nothing")
    model = keras.Model(inputs, keras.layers.Dense(3, name="head")(inputs), name="network")
    refused = r"hold numbers. Received: layer 'head', whose 'kernel' has the shape \(0, 3\)"
    for algorithm in (QUANTIZATION, SPARSITY):
        with pytest.raises(ValueError, match=refused):
            compressed(model, algorithm)


def test_an_empty_input_beside_another_is_none(tmp_path):
    point, nothing = keras.Input((6,), name="point"), keras.Input((0,), name="nothing")
    x = keras.layers.Concatenate(name="both")([point, nothing])
    model = keras.Model([point, nothing], keras.layers.Dense(2, name="head")(x), name="network")
    small = compressed(model, QUANTIZATION, data=(points(), points(size=0)))
    assert kc.export(small, tmp_path / "model.xml").relative < 1e-3


@pytest.mark.parametrize(
    "make",
    [
        lambda: keras.layers.Dense(0),
        lambda: keras.layers.Conv2D(0, 3),
        lambda: keras.layers.DepthwiseConv2D(3, depth_multiplier=0),
    ],
)
def test_keras_makes_no_layer_without_units(make):
    with pytest.raises(ValueError, match="positive"):
        make()
