"""Masks of whole channels, and the importance score that one of them collects in training."""

import keras
import numpy as np
import pytest
from backend_helpers import BACKEND, layer_gradients, numpy
from keras import layers

from keras_compress.layers import PrunableConv2D, PrunableDense
from keras_compress.masks import ChannelMask, TaylorMask

every_mask = pytest.mark.parametrize("cls", [ChannelMask, TaylorMask])
RATE = 0.1


def built(shape, cls=ChannelMask, **kwargs):
    mask = cls(**kwargs)
    mask.build(shape)
    return mask


def samples(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


@every_mask
def test_a_new_mask_leaves_everything_on(cls):
    mask = built((3, 2, 4), cls, axes=(-3, -1))
    x = samples(3, 2, 4)
    np.testing.assert_array_equal(numpy(mask(x)), x)
    names = [variable.name for variable in mask.non_trainable_variables]
    assert names == ["mask_3", "mask_1"]
    np.testing.assert_array_equal(mask.mask(-3), np.ones(3))
    assert mask.mask(-1).dtype == np.float32


@every_mask
def test_channels_are_switched_off_per_axis(cls):
    mask = built((3, 2, 4), cls, axes=(-3, -1))
    mask.set_mask(-3, [0, 1, 1])
    mask.set_mask(-1, np.array([True, False, True, False]))
    x = samples(3, 2, 4)
    expected = x.copy()
    expected[0] = expected[..., [1, 3]] = 0
    y = numpy(mask(x))
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(numpy(mask(y)), y)
    np.testing.assert_array_equal(numpy(mask(0 * x)), 0 * x)
    upstream = samples(3, 2, 4, seed=1)
    _, (gradient, *_) = layer_gradients(mask, x, upstream)
    np.testing.assert_array_equal(gradient, upstream * (expected != 0))


@every_mask
def test_the_mask_that_is_read_is_a_copy(cls):
    mask = built((4,), cls)
    mask.mask(-1)[:] = 0
    np.testing.assert_array_equal(mask.mask(-1), np.ones(4))


@every_mask
def test_which_axis_a_variable_belongs_to(cls):
    mask = built((3, 2, 4), cls, axes=(-3, -1), **{"scored_axis": -3} if cls is TaylorMask else {})
    axes = {variable.name: mask.state_axes(variable) for variable in mask.weights}
    assert axes.pop("score", (-3,)) == (-3,)
    assert axes == {"mask_3": (-3,), "mask_1": (-1,)}


@every_mask
def test_bad_axes_are_refused(cls):
    for axes in ((), (0,), (-1, -1), (-1.0,), (True,), -1, "a", None):
        with pytest.raises(ValueError, match="Expected a tuple of distinct axes.*Received: axes="):
            cls(axes=axes)
    with pytest.raises(ValueError, match="must exist and have a known size.*axis=-3"):
        built((2, 4), ChannelMask, axes=(-3,))
    with pytest.raises(ValueError, match="must exist and have a known size.*axis=-2"):
        built((None, 4), ChannelMask, axes=(-2,))


@every_mask
def test_bad_masks_are_refused(cls):
    mask = built((2, 4), cls)
    with pytest.raises(ValueError, match=r"one of the axes \(-1,\). Received: axis=-2"):
        mask.set_mask(-2, [1, 1])
    with pytest.raises(ValueError, match=r"shape \(4,\). Received: values of shape \(2,\)"):
        mask.set_mask(-1, [1, 1])
    for value in (0.5, 2, np.nan):
        with pytest.raises(ValueError, match="Expected ones and zeros. Received: values="):
            mask.set_mask(-1, [1, 1, 0, value])
    with pytest.raises(ValueError, match="Expected a mask that has been built. Received: 'new'"):
        cls(name="new").mask(-1)


def test_bad_arguments_of_a_scored_mask():
    with pytest.raises(ValueError, match=r"one of the axes \(-2,\). Received: scored_axis=-1"):
        TaylorMask(axes=(-2,))
    for calls in (0, 1.5, True):
        with pytest.raises(ValueError, match="positive whole number. Received: calls="):
            TaylorMask(calls=calls)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("axis", [-1, -2])
def test_the_gradient_of_the_score_is_its_next_value(axis, training):
    mask = built((3, 4), TaylorMask, axes=(-2, -1), scored_axis=axis)
    mask.set_mask(-1, [1, 0, 1, 1])
    before = samples(mask.score.shape[0], seed=2) ** 2
    mask.score.assign(before)
    x, upstream = samples(3, 4), samples(3, 4, seed=1)
    call = mask.call
    mask.call = lambda inputs, training=None: call(inputs, training=training)
    y, (dx, score) = layer_gradients(mask, x, upstream)
    np.testing.assert_array_equal(y, x * [1, 0, 1, 1])
    np.testing.assert_array_equal(dx, upstream * [1, 0, 1, 1])
    change = (upstream * x).sum(axis=-3 - axis)
    np.testing.assert_allclose(score, before + change**2, rtol=1e-5)


def test_the_score_of_a_vector():
    mask = built((4,), TaylorMask)
    x, upstream = samples(4), samples(4, seed=1)
    _, (_, score) = layer_gradients(mask, x, upstream)
    np.testing.assert_allclose(score, (upstream * x) ** 2, rtol=1e-5)


def scored_model(dtype="float32", units=4, **kwargs):
    inputs = keras.Input((3,))
    mask = TaylorMask(**kwargs)
    dense = PrunableDense(units, transforms={"kernel": [mask]}, dtype=dtype, name="dense")
    return keras.Model(inputs, dense(inputs)), mask


class Reference:
    """A dense layer with masked outputs under SGD and the mean squared error, in NumPy."""

    def __init__(self, kernel, bias, mask):
        self.kernel, self.bias, self.mask = (np.array(a, "float64") for a in (kernel, bias, mask))
        self.score = np.zeros(len(bias))

    def step(self, x, y):
        error = x @ (self.kernel * self.mask) + self.bias - y
        upstream = 2 * error / error.size
        gradient = x.T @ upstream
        self.score += (gradient * self.kernel).sum(axis=0) ** 2
        self.kernel -= RATE * gradient * self.mask
        self.bias -= RATE * upstream.sum(axis=0)


def test_three_steps_of_training():
    model, mask = scored_model()
    mask.set_mask(-1, [1, 1, 0, 1])
    reference = Reference(*map(numpy, model.layers[-1].plain_weights), mask.mask(-1))
    model.compile(keras.optimizers.SGD(RATE), "mse")
    for seed in range(3):
        x, y = samples(8, 3, seed=seed), samples(8, 4, seed=10 + seed)
        model.train_on_batch(x, y)
        reference.step(x, y)
    np.testing.assert_allclose(numpy(mask.score), reference.score, rtol=1e-4)
    kernel = numpy(model.layers[-1].raw_weight("kernel"))
    np.testing.assert_allclose(kernel, reference.kernel, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(mask.mask(-1), [1, 1, 0, 1])


OPTIMIZERS = {
    "decay and clipnorm": lambda: keras.optimizers.Adam(weight_decay=0.5, clipnorm=1e-4),
    "clipvalue": lambda: keras.optimizers.AdamW(clipvalue=1e-4),
    "global_clipnorm": lambda: keras.optimizers.SGD(momentum=0.9, global_clipnorm=1e-4),
    "rmsprop": lambda: keras.optimizers.RMSprop(centered=True),
    "adafactor": lambda: keras.optimizers.Adafactor(weight_decay=0.1),
    "lion": lambda: keras.optimizers.Lion(),
    "nadam": lambda: keras.optimizers.Nadam(),
    "ftrl": lambda: keras.optimizers.Ftrl(),
    "muon": lambda: keras.optimizers.Muon(),
    "adagrad": lambda: keras.optimizers.Adagrad(),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizers_leave_the_score_as_it_comes(optimizer):
    model, mask = scored_model()
    reference = Reference(*map(numpy, model.layers[-1].plain_weights), mask.mask(-1))
    model.compile(OPTIMIZERS[optimizer](), "mse")
    x, y = samples(8, 3), samples(8, 4, seed=1)
    model.fit(x, y, batch_size=8, epochs=1, verbose=0)
    reference.step(x, y)
    np.testing.assert_allclose(numpy(mask.score), reference.score, rtol=1e-4)


@pytest.mark.parametrize("jit_compile", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
def test_compiled_steps_in_half_precision(jit_compile, dtype):
    if jit_compile and BACKEND == "torch":
        pytest.skip("torch.compile takes half a minute; it gives the same")
    model, mask = scored_model(dtype)
    reference = Reference(*map(numpy, model.layers[-1].plain_weights), mask.mask(-1))
    optimizer = keras.optimizers.Adam(1e-9, weight_decay=1e-9, clipnorm=1.0)
    model.compile(optimizer, "mse", jit_compile=jit_compile)
    x, y = samples(8, 3), samples(8, 4, seed=1)
    kernel = reference.kernel.copy()
    for _ in range(2):
        model.train_on_batch(x, y)
        reference.step(x, y)
        reference.kernel, reference.bias = kernel.copy(), np.zeros(4)
    assert keras.backend.standardize_dtype(mask.score.dtype) == "float32"
    rtol = 1e-4 if dtype == "float32" else 0.1
    np.testing.assert_allclose(numpy(mask.score), reference.score, rtol=rtol, atol=1e-4)


def test_scaled_losses_scale_the_score():
    model, mask = scored_model()
    reference = Reference(*map(numpy, model.layers[-1].plain_weights), mask.mask(-1))
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(RATE), initial_scale=8.0)
    model.compile(optimizer, "mse")
    x, y = samples(8, 3), samples(8, 4, seed=1)
    model.train_on_batch(x, y)
    reference.step(x, y)
    np.testing.assert_allclose(numpy(mask.score), 64 * reference.score, rtol=1e-4)


def test_gradient_accumulation_takes_the_largest():
    model, mask = scored_model()
    weights = [*map(numpy, model.layers[-1].plain_weights)]
    model.compile(keras.optimizers.SGD(RATE, gradient_accumulation_steps=2), "mse")
    alone = []
    for seed in range(2):
        x, y = samples(8, 3, seed=seed), samples(8, 4, seed=10 + seed)
        reference = Reference(*weights, mask.mask(-1))
        reference.step(x, y)
        alone.append(reference.score)
        model.train_on_batch(x, y)
    np.testing.assert_allclose(numpy(mask.score), np.maximum(*alone), rtol=1e-4)


def test_a_shared_layer_sums_over_its_calls():
    inputs = keras.Input((3,))
    mask = TaylorMask(calls=2)
    dense = PrunableDense(3, use_bias=False, transforms={"kernel": [mask]})
    model = keras.Model(inputs, dense(dense(inputs)))
    w = numpy(dense.raw_weight("kernel")).copy()
    x, y = samples(8, 3), samples(8, 3, seed=1)
    model.compile(keras.optimizers.SGD(0.0), "mse")
    expected = np.zeros(3)
    for _ in range(2):
        model.train_on_batch(x, y)
        upstream = 2 * (x @ w @ w - y) / y.size
        changes = (x @ w).T @ upstream * w, x.T @ (upstream @ w.T) * w
        expected += sum(change.sum(axis=0) ** 2 for change in changes)
    np.testing.assert_allclose(numpy(mask.score), expected, rtol=1e-3)


def test_a_frozen_layer_keeps_its_score():
    inputs = keras.Input((3,))
    mask = TaylorMask()
    frozen = PrunableDense(4, transforms={"kernel": [mask]})
    model = keras.Model(inputs, layers.Dense(2)(frozen(inputs)))
    frozen.trainable = False
    model.compile("adam", "mse")
    model.fit(samples(8, 3), samples(8, 2), verbose=0)
    np.testing.assert_array_equal(numpy(mask.score), np.zeros(4))


@every_mask
def test_saving_is_bitwise_and_training_goes_on(cls, tmp_path):
    inputs = keras.Input((6, 6, 3))
    transforms = {"kernel": [cls(axes=(-2, -1))], "bias": [ChannelMask()]}
    conv = PrunableConv2D(4, 3, transforms=transforms)
    outputs = layers.GlobalAveragePooling2D()(conv(inputs))
    model = keras.Model(inputs, outputs)
    conv.transforms_of("kernel")[0].set_mask(-2, [1, 0, 1])
    conv.transforms_of("bias")[0].set_mask(-1, [0, 1, 1, 0])
    model.compile("adam", "mse")
    x, y = samples(8, 6, 6, 3), samples(8, 4)
    model.fit(x, y, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert [v.name for v in loaded.weights] == [v.name for v in model.weights]
    for before, after in zip(model.weights, loaded.weights, strict=True):
        np.testing.assert_array_equal(numpy(before), numpy(after))
    mask = loaded.layers[1].transforms_of("kernel")[0]
    assert type(mask) is cls and mask.axes == (-2, -1)
    for each in (model, loaded):
        each.fit(x, y, verbose=0, shuffle=False)  # the optimizer's state was saved too
    for before, after in zip(model.weights, loaded.weights, strict=True):
        np.testing.assert_allclose(numpy(before), numpy(after), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(mask.mask(-2), [1, 0, 1])
    if cls is TaylorMask:
        assert (numpy(mask.score) > 0).all() and mask.score.overwrite_with_gradient
