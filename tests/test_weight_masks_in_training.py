"""Masks of single weights inside layers and models: when they draw, training, files, stripping."""

import keras
import numpy as np
import pytest
from backend_helpers import BACKEND, numpy
from keras import layers
from test_weight_masks import LEARNED, MASKS, samples, scores_of, with_random_scores

import keras_compress as kc
from keras_compress.layers import (
    FakeQuantDense,
    PrunableConv2D,
    PrunableDense,
    PrunableLSTM,
    PrunableSeparableConv1D,
)
from keras_compress.masks import ChannelMask
from keras_compress.quantizers import SymmetricQuantizer
from keras_compress.weight_masks import LearnedMask, RBMask

every_mask = pytest.mark.parametrize("name", MASKS)
every_learned_mask = pytest.mark.parametrize("name", LEARNED)


def coin():
    """Return a mask that leaves everything on in inference, and half of it in training."""
    return RBMask(initial_probability=0.5001, seed=1)


def masked_dense():
    mask = coin()
    return mask, PrunableDense(
        1, kernel_initializer="ones", use_bias=False, transforms={"kernel": [mask]}
    )


def nested(layer):
    inner = keras.Sequential([keras.Input((64,)), layer])
    return keras.Sequential([keras.Input((64,)), inner])


class Outer(layers.Layer):
    """A layer that does not hand on whether it is trained."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def call(self, inputs):
        return self.layer(inputs)


WRAPPERS = {
    "model": lambda layer: keras.Sequential([keras.Input((64,)), layer]),
    "nested": nested,
    "in a layer": lambda layer: keras.Sequential([keras.Input((64,)), Outer(layer)]),
    "over time": lambda layer: keras.Sequential(
        [
            keras.Input((64,)),
            layers.Reshape((1, 64)),
            layers.TimeDistributed(layer),
            layers.Reshape((1,)),
        ]
    ),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_draws_in_training_only(wrapper):
    _, dense = masked_dense()
    model = WRAPPERS[wrapper](dense)
    model.compile(keras.optimizers.SGD(0.0), "mae")
    x = np.random.default_rng(0).integers(1, 9, (8, 64)).astype("float32")
    y = x.sum(axis=1, keepdims=True)
    for _ in range(2):
        assert model.fit(x, y, verbose=0).history["loss"][0] > 20
        assert model.evaluate(x, y, verbose=0) == 0
        np.testing.assert_array_equal(model.predict(x, verbose=0), y)
    assert float(model.train_on_batch(x, y)) > 20
    assert float(model.test_on_batch(x, y)) == 0
    np.testing.assert_array_equal(model.predict_on_batch(x), y)
    np.testing.assert_array_equal(numpy(model(x)), y)
    np.testing.assert_array_equal(numpy(model(x, training=False)), y)
    first, second = (numpy(model(x, training=True)) for _ in range(2))
    assert (first < y - 20).all() and (second < y - 20).all() and (first != second).any()
    np.testing.assert_array_equal(numpy(dense.kernel), np.ones((64, 1)))
    np.testing.assert_array_equal(dense.effective_weight("kernel"), np.ones((64, 1)))


def test_a_layer_without_the_argument_hands_it_on():
    _, dense = masked_dense()
    x = np.ones((1, 64), "float32")
    assert numpy(dense(x)) == 64 and numpy(dense(x, training=False)) == 64
    assert numpy(dense(x, training=True)) < 59


def test_one_draw_per_call_of_a_layer():
    masks = {name: coin() for name in ("depthwise_kernel", "pointwise_kernel", "kernel")}
    reads = dict.fromkeys(masks, 0)
    for name, mask in masks.items():
        noise = mask._noise

        def counted(name=name, noise=noise):
            reads[name] += 1
            return noise()

        mask._noise = counted
    kernel = masks.pop("kernel")
    inputs = keras.Input((5, 2))
    x = PrunableSeparableConv1D(3, 2, transforms={k: [m] for k, m in masks.items()})(inputs)
    model = keras.Model(inputs, PrunableLSTM(3, transforms={"kernel": [kernel]})(x))
    assert set(reads.values()) == {0}
    model(samples(1, 5, 2), training=True)
    assert set(reads.values()) == {1}
    model(samples(1, 5, 2))
    assert set(reads.values()) == {1}


def test_a_frozen_layer_does_not_draw():
    mask, dense = masked_dense()
    model = WRAPPERS["model"](dense)
    x = np.ones((1, 64), "float32")
    dense.trainable = False
    assert numpy(model(x, training=True)) == 64
    dense.trainable = True
    assert numpy(model(x, training=True)) < 59


@pytest.mark.parametrize("jit_compile", [True, False])
def test_a_mask_is_fixed_while_fit_runs(jit_compile):
    if jit_compile and BACKEND == "torch":
        pytest.skip("torch.compile takes half a minute; it gives the same")
    mask, dense = masked_dense()
    model = WRAPPERS["model"](dense)
    model.compile(keras.optimizers.SGD(0.0), "mae", jit_compile=jit_compile)

    class Fix(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                mask.fix(np.arange(64)[:, None] < 48)

    x, y = np.ones((8, 64), "float32"), np.full((8, 1), 64.0, "float32")
    fix = Fix()
    losses = model.fit(x, y, epochs=4, verbose=0, callbacks=[fix]).history["loss"]
    assert losses[0] != losses[1] and losses[2:] == [16.0, 16.0]
    assert mask.sparsity == 0.25


@every_learned_mask
@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
def test_scores_are_trained_until_the_mask_is_fixed(name, dtype):
    mask = MASKS[name]()
    dense = PrunableDense(4, transforms={"kernel": [mask]}, dtype=dtype)
    model = keras.Sequential([keras.Input((6,)), dense])
    with_random_scores(mask)
    model.compile(keras.optimizers.SGD(0.1), "mse")
    x, y = samples(8, 6), samples(8, 4, seed=1)
    before = numpy(scores_of(mask)).copy()
    model.fit(x, y, epochs=2, verbose=0)
    after = numpy(scores_of(mask)).copy()
    assert (after != before).all() and after.dtype == np.float32
    mask.fix()
    kept = mask.mask_values()
    model.fit(x, y, epochs=2, verbose=0)
    np.testing.assert_array_equal(numpy(scores_of(mask)), after)
    np.testing.assert_array_equal(dense.effective_weight("kernel") != 0, kept)


class Regularized(keras.Model):
    """A model whose masks are drawn to a share of weights kept, as the formula of RB asks."""

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        kept, size = self.mask.kept()
        return super().compute_loss(x, y, y_pred, sample_weight) + ((kept / size - 0.5) / 0.05) ** 2


def test_a_loss_draws_the_mask_to_its_target():
    inputs = keras.Input((40,))
    mask = RBMask(initial_probability=0.7, seed=3)
    dense = PrunableDense(20, transforms={"kernel": [mask]})
    model = Regularized(inputs, dense(inputs))
    model.mask = mask
    with_random_scores(mask)
    mask.logits.assign(numpy(mask.logits) + 1)
    assert mask.sparsity < 0.3
    model.compile(keras.optimizers.Adam(0.05), "mse")
    x, y = samples(8, 40), samples(8, 20, seed=1)
    model.fit(x, y, epochs=60, verbose=0)
    assert 0.4 < mask.sparsity < 0.6


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("name", LEARNED)
def test_terms_of_a_loss_are_computed_in_float32(name, mixed):
    class Adds(layers.Layer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.mask = MASKS[name]()

        def build(self, input_shape):
            self.mask.build((4, 8))

        def call(self, inputs):
            self.add_loss(self.mask.kept()[0] if name == "random" else self.mask.penalty())
            return inputs

    layer = Adds(dtype="mixed_bfloat16" if mixed else "float32")
    layer.build((2, 3))
    with_random_scores(layer.mask)
    layer(samples(2, 3))
    expected = layer.mask.kept()[0] if name == "random" else layer.mask.penalty()
    assert numpy(layer.losses[0]) == numpy(expected)


@every_mask
@pytest.mark.parametrize("file", ["model.keras", "model.weights.h5"])
def test_saving_is_bitwise(name, file, tmp_path):
    def made():
        transforms = {"kernel": [MASKS[name](), SymmetricQuantizer(bits=4)]}
        inputs = keras.Input((6,))
        return keras.Model(inputs, FakeQuantDense(4, transforms=transforms)(inputs))

    model = made()
    mask = model.layers[-1].transforms_of("kernel")[0]
    if isinstance(mask, LearnedMask):
        with_random_scores(mask)
    if name != "random":
        mask.set_mask(samples(6, 4) > 0)
    model.compile("adam", "mse")
    model.fit(samples(8, 6), samples(8, 4, seed=1), verbose=0)
    if file.endswith(".keras"):
        model.save(tmp_path / file)
        loaded = keras.models.load_model(tmp_path / file)
    else:
        model.save_weights(tmp_path / file)
        loaded = made()
        loaded.load_weights(tmp_path / file)
    for before, after in zip(model.weights, loaded.weights, strict=True):
        assert before.name == after.name and before.dtype == after.dtype
        np.testing.assert_array_equal(numpy(before), numpy(after))
    x = samples(8, 6)
    np.testing.assert_array_equal(model.predict(x, verbose=0), loaded.predict(x, verbose=0))
    twin = loaded.layers[-1].transforms_of("kernel")[0]
    np.testing.assert_array_equal(twin.mask_values(), mask.mask_values())
    loaded.compile("adam", "mse")
    loaded.fit(x, samples(8, 4, seed=1), verbose=0)


@every_mask
def test_stripping_bakes_the_mask_in(name):
    mask = MASKS[name]()
    inputs = keras.Input((8, 8, 2))
    first = PrunableConv2D(
        6,
        3,
        activation="relu",
        transforms={"kernel": [ChannelMask(), mask], "bias": [ChannelMask()]},
    )
    second = PrunableConv2D(4, 3, transforms={"kernel": [MASKS["given"]()]})
    model = keras.Model(inputs, layers.GlobalAveragePooling2D()(second(first(inputs))))
    if isinstance(mask, LearnedMask):
        with_random_scores(mask)
    else:
        mask.set_mask(samples(*mask.mask.shape) > 0)
    assert 0 < mask.sparsity < 1
    second.transforms_of("kernel")[0].set_mask(samples(3, 3, 6, 4) > 0)
    x = samples(4, 8, 8, 2)
    before = model.predict(x, verbose=0)
    plain = kc.strip(model)
    np.testing.assert_array_equal(plain.predict(x, verbose=0), before)
    assert type(plain.layers[1]) is layers.Conv2D
    kernel = numpy(plain.layers[1].kernel)
    np.testing.assert_array_equal(kernel != 0, mask.mask_values())
    for weight in ("kernel", "bias"):
        first.transforms_of(weight)[0].set_mask(-1, [1, 0, 1, 1, 0, 1])
    before = model.predict(x, verbose=0)
    plain = kc.strip(model)
    assert plain.layers[1].filters == 4
    np.testing.assert_allclose(plain.predict(x, verbose=0), before, rtol=1e-4, atol=1e-6)
    kept = mask.mask_values()[..., [0, 2, 3, 5]]
    np.testing.assert_array_equal(numpy(plain.layers[1].kernel) != 0, kept)
