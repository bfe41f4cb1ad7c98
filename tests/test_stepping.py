"""Training loops without `fit`: `step` and `finish` do what `Compress` does there."""

import functools
import gc
import json
import types
import weakref
import zipfile

import custom_loops
import keras
import numpy as np
import pytest
from backend_helpers import BACKEND, numpy
from keras import layers

import keras_compress as kc
from keras_compress.masks import ChannelMask
from keras_compress.stepping import Stepper
from keras_compress.weight_masks import WeightMask

LOOPS = [custom_loops.train_on_batch, custom_loops.OF_BACKEND[BACKEND]]
every_loop = pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)

EPOCH = 4  # steps
PRUNING = {
    "algorithm": "filter_pruning",
    "params": {"pruning_target": 0.6, "pruning_steps": 3, "round_to": 1, "num_init_steps": 1},
}
MAGNITUDE = {
    "algorithm": "magnitude_sparsity",
    "params": {
        "sparsity_target": 0.8,
        "sparsity_target_epoch": 2.5,
        "sparsity_freeze_epoch": 3,
        "update_per_optimizer_step": True,
    },
}
RB = {
    "algorithm": "rb_sparsity",
    "params": {"sparsity_target": 0.6, "sparsity_target_epoch": 2, "sparsity_freeze_epoch": 3},
}
MOVEMENT = {
    "algorithm": "movement_sparsity",
    "params": {
        "warmup_start_epoch": 1,
        "warmup_end_epoch": 3,
        "importance_regularization_factor": 0.1,
        "enable_structured_masking": False,
    },
}
QUANTIZATION = {"algorithm": "quantization"}
CONST = {"algorithm": "const_sparsity"}
CASES = {
    "quantization and pruning": [PRUNING, QUANTIZATION],
    "magnitude per step": [MAGNITUDE],
    "rb": [RB],
    "movement": [MOVEMENT],
}
every_case = pytest.mark.parametrize("case", CASES)


def network():
    inputs = keras.Input((8,), name="features")
    x = layers.Dense(16, name="first")(inputs)
    x = layers.ReLU()(layers.BatchNormalization(momentum=0.9, name="norm")(x))
    x = layers.Dense(12, activation="relu", name="second")(x)
    return keras.Model(inputs, layers.Dense(4, name="head")(x), name="network")


def data(samples=32):
    x = np.random.default_rng(0).normal(size=(samples, 8)).astype("float32")
    return x, x[:, :4].argmax(-1).astype("int32")


def batches(first, last):
    """Yield the batches of steps `first` to `last`, that one not included."""
    x, y = data()
    for step in range(first, last):
        part = slice(8 * (step % EPOCH), 8 * (step % EPOCH) + 8)
        yield x[part], y[part]


def compressed(*algorithms, calibrated=True, **arguments):
    keras.utils.set_random_seed(3)
    samples = data()[0] if calibrated else None
    config = {"compression": list(algorithms)}
    model = kc.compress_model(network(), config, data=samples, verbose=False)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    # Compiled by XLA or not, sums have another order.
    compiled = BACKEND == "jax" and "run_eagerly" not in arguments
    arguments = {"jit_compile": compiled} | arguments
    # Logits of learnt masks come from 4.6 below 0 in 16 steps.
    rate = 0.5 if "rb_sparsity" in [each["algorithm"] for each in algorithms] else 0.05
    model.compile(keras.optimizers.Adam(rate), loss, **arguments)
    return model


def masks(model):
    """Return {place and class of a mask, and its axis: values}."""
    found = {}
    for layer in model.layers:
        for weight in getattr(layer, "weight_names", ()):
            for transform in layer.transforms_of(weight):
                key = f"{layer.name} {weight} {type(transform).__name__}"
                if isinstance(transform, WeightMask):
                    found[key] = transform.mask_values()
                elif isinstance(transform, ChannelMask):
                    found |= {f"{key} {axis}": transform.mask(axis) for axis in transform.axes}
    return found


def random_states(model):
    """Return the states that random masks are drawn from."""
    layers_ = [layer for layer in model.layers if hasattr(layer, "weight_names")]
    transforms = [
        t for layer in layers_ for w in layer.weight_names for t in layer.transforms_of(w)
    ]
    return [t.seed_generator.state for t in transforms if hasattr(t, "seed_generator")]


class Steps(keras.callbacks.Callback):
    """Notes what holds in every step of `fit`, and its loss. To be placed behind `Compress`."""

    def __init__(self):
        super().__init__()
        self.losses, self.masks, self.eager = [], [], []

    def on_train_batch_begin(self, batch, logs=None):
        self.model.reset_metrics()
        self.masks.append(masks(self.model))
        self.eager.append(self.model.run_eagerly)

    def on_train_batch_end(self, batch, logs=None):
        self.losses.append(float(logs["loss"]))


def fitted(model, epochs):
    x, y = data()
    steps = Steps()
    callbacks = [kc.callbacks.Compress(), steps]
    model.fit(x, y, 8, epochs, shuffle=False, verbose=0, callbacks=callbacks)
    return run_of(model, steps.losses, steps.masks, steps.eager)


def run_of(model, losses, mask_steps, eager):
    """Return everything that is compared."""
    return types.SimpleNamespace(
        losses=losses,
        masks=[*mask_steps, masks(model)],
        eager=eager,
        progress=json.loads(json.dumps(model.progress)),
        ranges=[
            np.concatenate([r.ravel() for r in q.effective_range()]) for q in model.quantizers()
        ],
    )


def looped(loop, model, first, last, monkeypatch, steps_per_epoch=EPOCH):
    noted, eager = [], []

    def step(model, *arguments):
        eager.append(kc.stepping.step(model, *arguments))
        noted.append(masks(model))
        return eager[-1]

    monkeypatch.setattr(kc, "step", step)
    losses = loop(model, batches(first, last), steps_per_epoch)
    return run_of(model, losses, noted, eager)


def assert_same(run, expected):
    np.testing.assert_allclose(run.losses, expected.losses, rtol=1e-6)
    assert len(run.masks) == len(expected.masks)
    for received, wanted in zip(run.masks, expected.masks, strict=True):
        assert received.keys() == wanted.keys()
        assert all(np.array_equal(received[name], wanted[name]) for name in wanted)
    assert run.progress == expected.progress
    for received, wanted in zip(run.ranges, expected.ranges, strict=True):
        np.testing.assert_allclose(received, wanted, rtol=1e-5, atol=1e-7)


@functools.cache
def reference(case):
    """Return 4 epochs of `fit`."""
    return fitted(compressed(*CASES[case]), 4)


@every_case
def test_masks_move_in_the_reference(case):
    """Or the tests below would compare nothing."""
    expected = reference(case)
    off = [sum((mask == 0).sum() for mask in step.values()) for step in expected.masks]
    assert off[-1] > off[0] == 0
    assert len(expected.losses) == 16 and len(expected.masks) == 17


@pytest.mark.parametrize(
    "case, loop", [*((case, LOOPS[0]) for case in CASES), (next(iter(CASES)), LOOPS[1])]
)
def test_a_loop_does_what_fit_does(case, loop, monkeypatch):
    run = looped(loop, compressed(*CASES[case]), 0, 16, monkeypatch)
    assert_same(run, reference(case))
    assert not any(run.eager)


@every_case
def test_a_loop_goes_on_from_a_file_in_the_midst_of_an_epoch(case, monkeypatch, tmp_path):
    loop = LOOPS[1]
    model = compressed(*CASES[case])
    before = looped(loop, model, 0, 6, monkeypatch)
    model.save(tmp_path / "half.keras")
    again = keras.models.load_model(tmp_path / "half.keras")
    for state, kept in zip(random_states(model), random_states(again), strict=True):
        kept.assign(numpy(state))  # Keras' files hold no random states
    after = looped(loop, again, 6, 16, monkeypatch)
    joined = types.SimpleNamespace(**vars(after))
    joined.losses = before.losses + after.losses
    joined.masks = before.masks[:-1] + after.masks
    assert_same(joined, reference(case))


@every_loop
@pytest.mark.parametrize("evaluates", [True, False])
def test_ranges_that_are_read_from_the_first_batches(loop, evaluates, monkeypatch):
    # Without an evaluation before it, `train_on_batch` makes losses and metrics ready on made-up
    # values on torch: ranges must not be read from these.
    samples = {"range": {"type": "min_max", "num_init_samples": 16}}
    algorithm = QUANTIZATION | {"initializer": samples}
    expected = fitted(compressed(algorithm, calibrated=False), 2)
    model = compressed(algorithm, calibrated=False)
    if evaluates:  # the compiled function of this evaluation rounds nothing
        model.test_on_batch(*next(batches(0, 1)))
    run = looped(loop, model, 0, 8, monkeypatch, None)
    assert run.eager == expected.eager == [True, True] + 6 * [False]
    np.testing.assert_allclose(run.losses, expected.losses, rtol=1e-5)
    for received, wanted in zip(run.ranges, expected.ranges, strict=True):
        np.testing.assert_allclose(received, wanted, rtol=1e-4, atol=1e-6)
    assert not model.run_eagerly
    outputs = numpy(kc.strip(model)(data()[0]))
    np.testing.assert_allclose(model.predict(data()[0], verbose=0), outputs, atol=1e-6)


def calls_of(monkeypatch, train):
    """Return [(algorithm, method, step or epoch)] in the order of the calls that `train` makes."""
    seen = []
    for kind in (kc.FilterPruning, kc.Quantization):
        for method in ("update", "begin_epoch", "finish"):
            original = getattr(kind, method)

            def noting(self, model, *arguments, original=original, method=method):
                seen.append((self.name, method, *arguments[:1]))
                return original(self, model, *arguments) or method == "update"

            monkeypatch.setattr(kind, method, noting)
    train()
    monkeypatch.undo()
    return seen


def test_calls_come_in_the_order_of_fit(monkeypatch):
    models = [compressed(PRUNING, QUANTIZATION, run_eagerly=True) for _ in range(2)]
    fit = calls_of(monkeypatch, lambda: fitted(models[0], 2))

    def train():
        custom_loops.train_on_batch(models[1], batches(0, 8), EPOCH)

    loop = calls_of(monkeypatch, train)
    assert loop == fit
    names = ["filter_pruning", "quantization"]
    updates = [[(name, "update", step) for name in names] for step in range(9)]
    begins = [[(name, "begin_epoch", epoch) for name in names] for epoch in range(2)]
    ends = [(name, "finish") for name in names]
    expected = [updates[0], begins[0], *updates[1:5], begins[1], *updates[5:], ends]
    assert loop == [call for calls in expected for call in calls]


def test_what_does_not_move_is_asked_once(monkeypatch):
    asked = []

    def update(self, model, step, epoch):
        asked.append((step, epoch))
        return step < 2

    monkeypatch.setattr(kc.ConstSparsity, "update", update)
    model = compressed(CONST)
    for step in range(6):
        assert kc.step(model, step, EPOCH) is False
    assert asked == [(0, 0.0), (1, 0.25), (2, 0.5)]
    kc.finish(model, 6)
    kc.step(model, 6)  # the next training asks again
    assert asked[3:] == [(6, None)]


def test_steps_may_be_left_out():
    """Only the epoch that has come counts; the level of pruning is that of its schedule."""
    model = compressed(PRUNING, QUANTIZATION)
    kc.step(model, 0, EPOCH)
    kc.step(model, np.int64(11), EPOCH)
    assert model.progress["epoch"] == 2
    # 0 before `num_init_steps`, then 1 - (1 - 0.6)^(i / (3 - 1)) in epoch i from there
    assert model.progress["filter_pruning"]["level"] == pytest.approx(1 - 0.4 ** (1 / 2))


def test_numbers_are_whole():
    model = compressed(CONST)
    kc.step(model, 0)
    for step in (-1, 2.0, "2", None, True):
        for function in (kc.step, kc.finish):
            with pytest.raises(ValueError, match=f"at least 0.*Received: step={step!r}"):
                function(model, step)
    for length in (0, -4, 4.0, False):
        with pytest.raises(ValueError, match=f"at least 1.*Received: steps_per_epoch={length!r}"):
            kc.step(model, 0, length)


def test_steps_do_not_go_back():
    model = compressed(PRUNING)
    kc.step(model, 5, EPOCH)
    message = "not before 5, the last one of model 'network'. Received: step=4. .*finish.model, 5"
    for function in (kc.step, kc.finish):
        with pytest.raises(ValueError, match=message):
            function(model, 4)
    kc.step(model, 5, EPOCH)  # a batch that was left out
    kc.finish(model, 5)
    kc.step(model, 0, EPOCH)  # another training


@pytest.mark.parametrize("model", [network, lambda: "network", lambda: None])
@pytest.mark.parametrize("function", [kc.step, kc.finish])
def test_other_models_are_refused(function, model):
    with pytest.raises(ValueError, match="compress_model.*Received: model '(network|None)'"):
        function(model(), 0)


def test_only_what_has_begun_is_finished():
    model = compressed(CONST)
    for _ in range(2):
        with pytest.raises(ValueError, match="Received: model 'network', which `step` was not"):
            kc.finish(model, 3)
        kc.step(model, 3)
        kc.finish(model, 3)


FOLLOWING = {
    "filter_pruning": PRUNING,
    "magnitude_sparsity": MAGNITUDE,
    "rb_sparsity": RB,
    "movement_sparsity": MOVEMENT,
    "quantization": QUANTIZATION | {"params": {"weights_quant_start_epoch": 2}},
}


@pytest.mark.parametrize("name", FOLLOWING)
def test_what_follows_epochs_needs_their_length(name):
    model = compressed(FOLLOWING[name])
    before = json.dumps(model.progress)
    message = f"`steps_per_epoch`, as {name} of model 'network' follows epochs. Received: steps_per"
    with pytest.raises(ValueError, match=message):
        kc.step(model, 0)
    assert json.dumps(model.progress) == before
    kc.step(model, 0, EPOCH)
    kc.step(model, 1)  # once it is known it need not be said again


@pytest.mark.parametrize(
    "algorithms",
    [
        [QUANTIZATION],
        [CONST],
        [{"algorithm": "filter_pruning", "params": {"schedule": "baseline", "round_to": 1}}],
    ],
)
def test_what_follows_no_epochs_needs_none(algorithms):
    model = compressed(*algorithms)
    before = masks(model)
    for step in range(3):
        kc.step(model, step)
    assert all(np.array_equal(mask, before[name]) for name, mask in masks(model).items())


def test_a_rate_that_is_held_follows_no_epochs():
    model = compressed(PRUNING)
    model.config.algorithms[0].set_rate(model, 0.25)
    kc.step(model, 0)
    assert model.progress["filter_pruning"]["level"] == 0.25


@pytest.mark.parametrize("algorithm", [MAGNITUDE, MOVEMENT], ids=lambda each: each["algorithm"])
def test_the_length_in_the_configuration_will_do(algorithm, monkeypatch):
    """Then masks come out as with the length given in every step, the fixed ones too."""
    lengths = {"params": algorithm["params"] | {"steps_per_epoch": EPOCH}}
    run = looped(LOOPS[0], compressed(algorithm | lengths), 0, 16, monkeypatch, None)
    (case,) = [name for name, algorithms in CASES.items() if algorithms == [algorithm]]
    assert_same(run, reference(case))


def test_an_algorithm_of_ones_own_follows_epochs_where_it_asks_for_them(monkeypatch):
    begun = []
    monkeypatch.setattr(
        kc.ConstSparsity, "begin_epoch", lambda self, model, epoch: begun.append(epoch)
    )
    model = compressed(CONST)
    with pytest.raises(ValueError, match="as const_sparsity of model"):
        kc.step(model, 0)
    for step in range(9):
        kc.step(model, step, EPOCH)
    assert begun == [0, 1, 2]


def test_a_smaller_model_goes_on():
    model = compressed(PRUNING)
    custom_loops.train_on_batch(model, batches(0, 15), EPOCH)
    assert all(algorithm.masks_are_final(model) for algorithm in model.config.algorithms)
    small, optimizer = kc.shrink(model, optimizer=model.optimizer)
    assert small.count_params() < model.count_params()
    small.compile(optimizer, model.loss)
    losses = custom_loops.train_on_batch(small, batches(15, 20), EPOCH)
    model_losses = custom_loops.train_on_batch(model, batches(15, 20), EPOCH)
    np.testing.assert_allclose(losses, model_losses, rtol=2e-4)
    assert small.progress["epoch"] == 4


def test_nothing_of_a_loop_is_kept_or_saved(tmp_path):
    model = compressed(QUANTIZATION)
    assert model.progress == {}
    model.save(tmp_path / "before.keras")
    kc.step(model, 7)
    model.save(tmp_path / "after.keras")
    configs = [
        zipfile.ZipFile(tmp_path / f"{name}.keras").read("config.json")
        for name in ("before", "after")
    ]
    assert configs[0] == configs[1]
    stepper = weakref.ref(kc.stepping._LOOPS[model].stepper)
    kept = weakref.ref(model)
    del model
    keras.utils.clear_session(free_memory=False)
    gc.collect()
    assert kept() is None and stepper() is None


def test_the_users_eager_mode_stays():
    model = compressed(QUANTIZATION, calibrated=False, run_eagerly=True)
    custom_loops.train_on_batch(model, batches(0, 2))
    assert model.run_eagerly
    assert all(quantizer.calibrated for quantizer in model.quantizers())  # too few, made do with


def test_a_model_that_is_not_compiled():
    model = kc.compress_model(network(), {"compression": QUANTIZATION})
    assert not model.compiled
    assert kc.step(model, 0) is True
    model(data()[0], training=True)
    kc.finish(model, 1)
    assert all(quantizer.calibrated for quantizer in model.quantizers())
    assert not model.run_eagerly


def test_a_stepper_begins_an_epoch_once():
    model = compressed(PRUNING)
    stepper = Stepper(model)
    assert [stepper.begin_epoch(model, epoch) for epoch in (0, 0, 1, 1)] == [True, False] * 2
    assert not Stepper(model).begin_epoch(model, 1)  # nor where training resumes
