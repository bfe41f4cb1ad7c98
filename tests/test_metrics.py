"""Which way a metric is better, and how models are judged by one."""

import keras
import numpy as np
import pytest
from backend_helpers import BACKEND, numpy
from keras import layers

from keras_compress.graph.trace import trace
from keras_compress.metrics import check_mode, lower_is_better
from keras_compress.training.judging import Judge, Replay, repeatable


@pytest.mark.parametrize(
    "name",
    ["loss", "val_loss", "mean_squared_error", "digit_mean_absolute_error", "mse", "val_MAE"]
    + ["rmse", "sparse_categorical_crossentropy", "kl_divergence", "hinge", "poisson", "logcosh"],
)
def test_losses_and_errors_are_better_low(name):
    assert lower_is_better(name)
    assert not lower_is_better(name, "max")


@pytest.mark.parametrize("name", ["accuracy", "val_auc", "errors_found", "top_k", "f1_score"])
def test_all_others_are_better_high(name):
    assert not lower_is_better(name)
    assert lower_is_better(name, "min")


def test_unknown_mode():
    for check in (check_mode, lambda mode: lower_is_better("loss", mode)):
        with pytest.raises(ValueError, match="Expected mode 'auto', 'min' or 'max'.*mode='up'"):
            check("up")


def network(heads=("head",)):
    inputs = keras.Input((4,), name="vector")
    outputs = [layers.Dense(3, name=name)(inputs) for name in heads]
    return keras.Model(inputs, outputs[0] if len(heads) == 1 else outputs, name="network")


def data(count=70):
    random = np.random.default_rng(0)
    return random.normal(size=(count, 4)).astype("float32"), random.integers(0, 3, count)


def judged(metric, model=None, given=None, **options):
    model = model or network()
    given = data() if given is None else given
    judge = Judge(metric, model, trace(model), given, **options)
    twin = keras.models.clone_model(model)
    twin = keras.Model(twin.input, twin.output)
    twin.set_weights(model.get_weights())
    return judge, judge(twin)


def test_accuracy_is_the_share_of_right_classes():
    model = network()
    x, y = data()
    judge, value = judged("accuracy", model)
    assert judge.name == "accuracy"
    assert value == pytest.approx(np.mean(numpy(model(x)).argmax(axis=-1) == y))
    _, value = judged("accuracy", model, samples=33)
    assert value == pytest.approx(np.mean(numpy(model(x[:64])).argmax(axis=-1) == y[:64]))


def test_targets_in_their_own_structure():
    """A metric of Keras, with targets of the output's shape, and inputs by name."""
    model = network()
    x, _ = data()
    targets = np.random.default_rng(1).normal(size=(len(x), 3)).astype("float32")
    judge, value = judged("mse", model, ({"vector": x}, targets))
    assert value == pytest.approx(np.square(numpy(model(x)) - targets).mean(), rel=1e-5)
    assert judge.drop(2.0, 0.5) == 1.5


def test_the_drop_counts_in_the_direction_that_is_worse():
    judge, _ = judged("accuracy")
    assert judge.drop(0.25, 0.75) == 0.5
    assert judge.drop(0.75, 0.25) == -0.5
    assert judge.drop(float("nan"), 0.5) == np.inf
    judge, _ = judged("accuracy", mode="min")
    assert judge.drop(0.75, 0.25) == 0.5


def test_a_loss_with_several_outputs():
    model = network(("left", "right"))
    model.compile("sgd", ["mse", "mse"], loss_weights=[1.0, 3.0])
    x, _ = data()
    targets = [np.zeros((len(x), 3), "float32"), np.ones((len(x), 3), "float32")]
    batches = [(x[:32], [t[:32] for t in targets]), (x[32:], [t[32:] for t in targets])]
    judge, value = judged("loss", model, batches)
    left, right = (numpy(y) for y in model(x))
    expected = np.square(left).mean() + 3 * np.square(right - 1).mean()
    assert value == pytest.approx(expected, rel=1e-5)
    assert judge.drop(2.0, 0.5) == 1.5


def test_inputs_in_a_list():
    inputs = [keras.Input((4,), name="a"), keras.Input((4,), name="b")]
    model = keras.Model(inputs, layers.Dense(3, name="head")(layers.Add(name="add")(inputs)))
    x, y = data()
    _, value = judged("accuracy", model, ((x, 2 * x), y))
    assert value == pytest.approx(np.mean(numpy(model([x, 2 * x])).argmax(axis=-1) == y))


def test_a_function_is_called_with_the_model():
    model = network()

    def count(given):
        return given.count_params()

    judge, value = judged(count, model, given="not read")
    assert (judge.name, value) == ("count", 15.0)

    class Counter:
        def __call__(self, given):
            return np.float64(given.count_params())

    judge, value = judged(Counter(), model, given="not read")
    assert (judge.name, value) == ("Counter", 15.0)


class Several(keras.metrics.Mean):
    """A metric with two values."""

    def update_state(self, y_true, y_pred, sample_weight=None):
        return super().update_state(y_pred)

    def result(self):
        return {"low": super().result(), "high": super().result()}


def test_bad_metrics():
    with pytest.raises(ValueError, match="one value. Received: metric='several'.*'high', 'low'"):
        judged(Several(name="several"))
    with pytest.raises(ValueError, match="metric 'words' to give a number. Received: 'much'"):

        def words(model):
            return "much"

        judged(words)
    for metric in (None, 3, keras.metrics.MeanSquaredError):
        with pytest.raises(TypeError, match="Expected the name of a metric.*Received: metric="):
            judged(metric)
    with pytest.raises(ValueError, match="one output.*'network' with 2 outputs"):
        judged("accuracy", network(("left", "right")))
    with pytest.raises(ValueError, match="name of a metric of Keras.*metric='acuracy'"):
        judged("acuracy")
    with pytest.raises(ValueError, match="compiled with a loss, for `metric` 'loss'"):
        judged("loss")


class Endless(keras.utils.PyDataset):
    """Batches that never end."""

    @property
    def num_batches(self):
        return None

    def __getitem__(self, index):
        x, y = data(32)
        return x + index, y


def test_data_without_end():
    with pytest.raises(ValueError, match="Expected `samples`.*Received: samples=None"):
        judged("accuracy", given=Endless())
    x, y = data(32)
    model = network()
    expected = [np.mean(numpy(model(x + i)).argmax(axis=-1) == y) for i in range(2)]
    assert judged("accuracy", model, Endless(), samples=40)[1] == pytest.approx(np.mean(expected))


def test_tensorflow_datasets():
    tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
    x, y = data(64)
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(64).batch(32)
    with pytest.raises(ValueError, match="Expected `samples`"):
        judged("accuracy", given=dataset.repeat())
    if BACKEND == "tensorflow":
        batches = repeatable(dataset)
        first, again = ([numpy(x) for x, _ in batches] for _ in range(2))
        assert all(np.array_equal(*pair) for pair in zip(first, again, strict=True))


def test_labels_are_needed():
    with pytest.raises(ValueError, match="Expected labelled data"):
        judged("accuracy", given=data()[0])


def test_batches_that_can_be_read_again():
    read = []

    def batches():
        for index in range(3):
            read.append(index)
            yield index

    replay = Replay(batches())
    assert [next(iter(replay)), read] == [0, [0]]
    assert [list(replay), list(replay), read] == [[0, 1, 2], [0, 1, 2], [0, 1, 2]]


def test_data_that_are_repeatable_stay_as_they_are():
    for each in (data(), data()[0], [data()], {"vector": data()[0]}, Endless(), "text", None):
        assert repeatable(each) is each
    assert list(repeatable(iter([1, 2]))) == [1, 2]
