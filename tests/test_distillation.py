"""Knowledge distillation: formulas, a still teacher, every algorithm, shrinking, files."""

import zipfile

import h5py
import keras
import numpy as np
import pytest
from backend_helpers import numpy, value_and_gradients
from keras import layers

import keras_compress as kc
from keras_compress.algorithms.knowledge_distillation import SoftTargets
from keras_compress.graph.trace import trace
from keras_compress.teacher import Teacher

RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.normal(size=(48, 8, 8, 1)).astype("float32")
CLASSES = np.arange(48) % 4
CROSS_ENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def network(activation=None, dropout=0.0):
    keras.utils.set_random_seed(1)
    inputs = keras.Input((8, 8, 1), name="image")
    x = layers.Conv2D(16, 3, padding="same", name="first")(inputs)
    x = layers.BatchNormalization(name="norm")(x)
    x = layers.ReLU(name="relu")(x)
    x = layers.Conv2D(16, 3, padding="same", name="second")(x)
    x = layers.ReLU(name="relu2")(x)
    x = layers.GlobalAveragePooling2D()(x)
    x = layers.Dropout(dropout)(x)
    outputs = layers.Dense(4, activation=activation, name="out")(x)
    return keras.Model(inputs, outputs)


def distillation(**options):
    return {"algorithm": "knowledge_distillation", "type": "softmax"} | options


def compressed(model, *algorithms, data=IMAGES, loss=CROSS_ENTROPY):
    student = kc.compress_model(model, {"compression": list(algorithms)}, data, verbose=False)
    student.compile(keras.optimizers.SGD(0.05), loss)
    return student


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def nncf_softmax_loss(student, teacher, scale, temperature):
    """The formula of NNCF's `KDLossCalculator`, for outputs `(samples, classes)`."""
    s, t = (np.asarray(x, "float64") / temperature for x in (student, teacher))
    classes = s.shape[-1]
    return scale * temperature**2 * classes * np.mean(-np.log(softmax(s)) * softmax(t))


def added(student, inputs=IMAGES[:8], targets=CLASSES[:8]):
    """Return what training adds to the loss of a batch, and the outputs it was computed from."""
    outputs = student(inputs, training=True)
    losses = [
        float(numpy(student.compute_loss(inputs, targets, outputs, training=training)))
        for training in (True, False)
    ]
    return losses[0] - losses[1], numpy(outputs)


# ---------------------------------------------------------------- formulas


def test_softmax_loss_equals_nncf_formula_on_made_up_logits():
    teacher = np.array([[2.0, -1.0, 0.5], [0.0, 0.0, 3.0]], "float32")
    student = np.array([[1.0, 0.0, 0.0], [-1.0, 2.0, 1.0]], "float32")
    for temperature in (1.0, 2.5, 8.0):
        found = float(numpy(SoftTargets(temperature).compute_loss(teacher, student)))
        assert found == pytest.approx(nncf_softmax_loss(student, teacher, 1, temperature), rel=1e-5)


def test_softmax_loss_by_hand():
    # softmax([ln 3, 0]) = [3/4, 1/4]; the student gives [1/2, 1/2]: a cross entropy of ln 2.
    teacher, student = np.log([[3.0, 1.0]]).astype("float32"), np.zeros((1, 2), "float32")
    assert float(numpy(SoftTargets(1.0).compute_loss(teacher, student))) == pytest.approx(np.log(2))


def test_softmax_loss_differs_from_keras_by_the_entropy_of_the_teacher():
    teacher, student = RANDOM.normal(size=(2, 6, 5)).astype("float32")
    # With an instance of the loss: by its name, Keras 3.15 takes the divergence of the logits.
    divergence = keras.losses.KLDivergence()
    keras_loss = keras.distillation.LogitsDistillation(temperature=3.0, loss=divergence)
    theirs = float(numpy(keras_loss.compute_loss(teacher, student)))
    ours = float(numpy(SoftTargets(3.0).compute_loss(teacher, student)))
    p = softmax(teacher.astype("float64") / 3.0)
    entropy = 9 * np.mean(np.sum(-p * np.log(p), axis=-1))
    assert ours - theirs == pytest.approx(entropy, rel=1e-4)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_loss_of_probabilities_is_that_of_their_logits(kind):
    teacher, student = RANDOM.normal(size=(2, 6, 5)).astype("float32")
    activate = {"softmax": keras.ops.softmax, "sigmoid": keras.ops.sigmoid}[kind]
    found = SoftTargets(2.0, kind).compute_loss(activate(teacher), activate(student))
    if kind == "softmax":
        expected = nncf_softmax_loss(student, teacher, 1, 2.0)
    else:  # two classes with the logits x and 0
        pairs = [np.stack([x, np.zeros_like(x)], -1).reshape(-1, 2) for x in (student, teacher)]
        expected = 5 * nncf_softmax_loss(*pairs, 1, 2.0)
    assert float(numpy(found)) == pytest.approx(expected, rel=1e-4)


def test_improbable_classes_keep_their_gradient():
    # p = e^-40 is far below what Keras clips probabilities to.
    student, teacher = (np.array([[x, 0.0]], "float32") for x in (-40.0, 0.0))
    _, (gradient,) = value_and_gradients(
        lambda logits: SoftTargets(1.0).compute_loss(teacher, logits), [student], np.float32(1)
    )
    np.testing.assert_allclose(gradient, [[-0.5, 0.5]], atol=1e-6)  # softmax(s) - softmax(t)


# ---------------------------------------------------------------- in a model


@pytest.mark.parametrize("type_", ["softmax", "mse"])
def test_what_is_added_to_the_loss_equals_the_formula(type_):
    model = network()
    options = distillation(type=type_, scale=0.7, temperature=3.0)
    student = compressed(model, options, {"algorithm": "quantization"})
    found, outputs = added(student)
    teacher = model.predict(IMAGES[:8], verbose=0)
    mse = 0.7 * np.mean((outputs - teacher) ** 2)
    expected = mse if type_ == "mse" else nncf_softmax_loss(outputs, teacher, 0.7, 3.0)
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("loss", ["mse", "mae", "cosine_similarity"])
def test_inner_tensors_are_distilled(loss):
    model = network()
    features = {"target_scopes": ["relu", "second"], "scale": 2.0, "loss": loss}
    student = compressed(
        model, distillation(scale=0.0, features=features), {"algorithm": "quantization"}
    )
    found, _ = added(student)
    expected = 0.0
    for name in ("relu", "second"):
        teacher, own = (
            keras.Model(each.input, each.get_layer(name).output)(IMAGES[:8], training=training)
            for each, training in ((model, False), (student, True))
        )
        teacher, own = numpy(teacher), numpy(own)
        if loss == "cosine_similarity":
            unit = [x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (teacher, own)]
            expected -= 2.0 * np.mean(np.sum(unit[0] * unit[1], axis=-1))
        else:
            difference = np.abs(teacher - own)
            expected += 2.0 * np.mean(difference**2 if loss == "mse" else difference)
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert abs(expected) > 1e-4


def test_inner_tensors_come_from_the_same_forward_pass():
    # One update of the moving statistics per step, with and without inner tensors.
    found = []
    for features in (None, {"target_scopes": ["relu"]}):
        student = compressed(network(), distillation(features=features))
        student.train_on_batch(IMAGES[:8], CLASSES[:8])
        found.append(numpy(student.get_layer("norm").moving_mean))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-6)


def test_evaluation_has_the_plain_loss():
    model = network()
    student = compressed(model, distillation(scale=100.0))
    model.compile(loss=CROSS_ENTROPY)
    plain, own = (m.evaluate(IMAGES, CLASSES, verbose=0) for m in (model, student))
    assert own == pytest.approx(plain, rel=1e-6)


def test_the_teacher_never_moves():
    model = network(dropout=0.5)
    student = compressed(model, distillation(), {"algorithm": "quantization"})
    teacher = student._teacher().model
    before = [numpy(v) for v in teacher.variables]
    first = numpy(student._teacher().lesson(IMAGES, ())[0])
    student.fit(IMAGES, CLASSES, epochs=2, verbose=0, callbacks=[kc.callbacks.Compress()])
    assert not np.array_equal(numpy(student.get_layer("norm").moving_mean), before[2])
    for variable, value in zip(teacher.variables, before, strict=True):
        np.testing.assert_array_equal(numpy(variable), value)
    # In inference mode: no dropout, moving statistics.
    np.testing.assert_array_equal(numpy(student._teacher().lesson(IMAGES, ())[0]), first)
    np.testing.assert_allclose(first, model.predict(IMAGES, verbose=0), rtol=1e-5, atol=1e-6)
    assert not any(v is w for v in teacher.variables for w in student.variables)


def test_the_teacher_is_what_the_model_was_when_it_was_compressed():
    model = network()
    student = compressed(model, distillation())
    before = model.predict(IMAGES, verbose=0)
    model.set_weights([weight + 1 for weight in model.get_weights()])
    found = numpy(student._teacher().lesson(IMAGES, ())[0])
    np.testing.assert_allclose(found, before, rtol=1e-5, atol=1e-6)


def test_distillation_draws_the_student_to_its_teacher():
    distances = []
    for scale in (0.0, 10.0):
        model = network()
        student = compressed(
            model,
            distillation(type="mse", scale=scale),
            {"algorithm": "quantization", "weights": {"bits": 2}},
        )
        student.fit(IMAGES, CLASSES, 16, 10, verbose=0, callbacks=[kc.callbacks.Compress()])
        outputs = [m.predict(IMAGES, verbose=0) for m in (model, student)]
        distances.append(np.mean((outputs[0] - outputs[1]) ** 2))
    assert distances[1] < 0.5 * distances[0]


@pytest.mark.parametrize(
    "algorithm",
    [
        {"algorithm": "quantization", "range_decay": 1e-4},
        {"algorithm": "filter_pruning", "params": {"pruning_target": 0.5, "round_to": 2}},
        {"algorithm": "magnitude_sparsity", "params": {"schedule": "multistep"}},
        {"algorithm": "rb_sparsity"},
        {"algorithm": "const_sparsity"},
        {"algorithm": "binarization", "mode": "xnor"},
        {
            "algorithm": "movement_sparsity",
            "params": {
                "warmup_start_epoch": 1,
                "warmup_end_epoch": 2,
                "importance_regularization_factor": 0.1,
                "enable_structured_masking": False,
            },
        },
    ],
    ids=lambda entry: entry["algorithm"],
)
def test_every_algorithm_learns_from_a_teacher(algorithm):
    student = compressed(network(), distillation(temperature=2.0), algorithm)
    alone = compressed(network(), algorithm)
    for each in (student, alone):
        each.optimizer.learning_rate = 0.0
    losses = []
    for each in (student, alone):
        keras.utils.set_random_seed(3)
        callbacks = [kc.callbacks.Compress()]
        history = each.fit(IMAGES, CLASSES, 48, 1, verbose=0, callbacks=callbacks)
        losses.append(history.history["loss"][0])
    # The same but for the distillation, which is at least T^2 times the entropy of the teacher.
    p = softmax(network().predict(IMAGES, verbose=0).astype("float64") / 2.0)
    entropy = 4 * np.mean(np.sum(-p * np.log(p), axis=-1))
    assert losses[0] - losses[1] > entropy * (1 - 1e-3)


# ---------------------------------------------------------------- shrinking and files


def pruned(features):
    pruning = {
        "algorithm": "filter_pruning",
        "params": {
            "schedule": "baseline",
            "pruning_target": 0.5,
            "num_init_steps": 1,
            "prune_first_conv": True,
        },
    }
    return compressed(network(), distillation(scale=0.5, features=features), pruning)


def test_training_goes_on_with_the_teacher_after_shrinking():
    student = pruned({"target_scopes": ["relu", "relu2"]})
    callbacks = [kc.callbacks.Compress(shrink=True)]
    student.fit(IMAGES, CLASSES, 16, 3, verbose=0, callbacks=callbacks)
    assert student.get_layer("first").filters == 8
    found, outputs = added(student)
    model = network()
    expected = nncf_softmax_loss(outputs, model.predict(IMAGES[:8], verbose=0), 0.5, 1.0)
    for name in ("relu", "relu2"):
        axis, positions = student.progress["knowledge_distillation"]["features"][name]
        assert axis == -1
        assert len(positions) == 8
        teacher = keras.Model(model.input, model.get_layer(name).output).predict(
            IMAGES[:8], verbose=0
        )
        own = keras.Model(student.input, student.get_layer(name).output)(IMAGES[:8], training=True)
        expected += np.mean((teacher[..., positions] - numpy(own)) ** 2)
    assert found == pytest.approx(expected, rel=1e-3)


def test_shrinking_keeps_the_channels_that_are_alike():
    student = pruned({"target_scopes": ["first"]})
    callbacks = [kc.callbacks.Compress()]
    student.fit(IMAGES, CLASSES, 16, 2, verbose=0, callbacks=callbacks)
    keep = np.abs(numpy(student.get_layer("first").effective_weight("kernel"))).sum((0, 1, 2)) > 0
    small = kc.shrink(student)
    found = small.progress["knowledge_distillation"]["features"]["first"]
    assert found == [-1, np.flatnonzero(keep).tolist()]
    # Nothing is left to cut: the positions are still those of the teacher.
    assert student.progress["knowledge_distillation"]["features"]["first"] is None
    smaller = kc.shrink(small)
    assert smaller.progress["knowledge_distillation"]["features"]["first"] == found


def test_a_file_holds_no_teacher_and_training_needs_it_again(tmp_path):
    model = network()
    algorithms = distillation(features={"target_scopes": ["relu"]}), {"algorithm": "quantization"}
    student = compressed(model, *algorithms)
    bare = compressed(model, algorithms[1])
    student.fit(IMAGES, CLASSES, 16, 1, verbose=0, callbacks=[kc.callbacks.Compress()])
    bare.fit(IMAGES, CLASSES, 16, 1, verbose=0, callbacks=[kc.callbacks.Compress()])
    held = {}
    for name, each in {"student": student, "bare": bare}.items():
        path = tmp_path / f"{name}.keras"
        each.save(path)
        with (
            zipfile.ZipFile(path) as archive,
            archive.open("model.weights.h5") as file,
            h5py.File(file) as weights,
        ):
            found = {}
            weights.visititems(lambda at, item, found=found: found.update({at: item}))
            held[name] = sorted(
                str(item.shape)
                for at, item in found.items()
                if isinstance(item, h5py.Dataset) and not at.endswith("/facts")  # JSON, no weight
            )
    assert held["student"] == held["bare"]

    loaded = keras.models.load_model(tmp_path / "student.keras")
    with pytest.raises(ValueError, match=r"set_teacher\(original\)"):
        loaded.fit(IMAGES, CLASSES, verbose=0, callbacks=[kc.callbacks.Compress()])
    loaded.set_teacher(model)
    losses = []
    for each in (student, loaded):
        keras.utils.set_random_seed(5)
        history = each.fit(IMAGES, CLASSES, verbose=0, callbacks=[kc.callbacks.Compress()])
        losses.append(history.history["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    # Inference, evaluation and export never need it.
    assert keras.models.load_model(tmp_path / "student.keras").evaluate(IMAGES, CLASSES, verbose=0)


def test_stripped_models_have_nothing_left_of_it():
    student = compressed(network(), distillation(features={"target_scopes": ["relu"]}))
    plain = kc.strip(student)
    assert type(plain).__module__.startswith("keras.")
    np.testing.assert_allclose(
        plain.predict(IMAGES, verbose=0), student.predict(IMAGES, verbose=0), rtol=1e-6
    )


# ---------------------------------------------------------------- structures and kinds


def test_several_inputs_and_outputs_by_name():
    a, b = keras.Input((3,), name="a"), keras.Input((3,), name="b")
    x = layers.Dense(8, activation="relu", name="hidden")(layers.Concatenate()([a, b]))
    outputs = {
        "classes": layers.Dense(3, activation="softmax", name="classes")(x),
        "yes": layers.Dense(1, activation="sigmoid", name="yes")(x),
        "size": layers.Dense(1, name="size")(x),
    }
    model = keras.Model({"a": a, "b": b}, outputs)
    inputs = {name: RANDOM.normal(size=(6, 3)).astype("float32") for name in "ab"}
    config = {"compression": [distillation(temperature=2.0), {"algorithm": "quantization"}]}
    notes = " ".join(kc.plan(model, config).notes)
    assert "classes (softmax)" in notes
    assert "yes (sigmoid)" in notes
    assert "outputs size are no distribution: left out" in notes

    student = kc.compress_model(model, config, [inputs], verbose=False)
    student.compile("sgd", dict.fromkeys(outputs, "mse"))
    targets = {"classes": np.eye(3)[[0, 1, 2] * 2], "yes": np.ones((6, 1)), "size": np.ones((6, 1))}
    made = student(inputs, training=True)
    found = [
        float(numpy(student.compute_loss(inputs, targets, made, training=training)))
        for training in (True, False)
    ]
    taught = {name: numpy(value) for name, value in model(inputs).items()}
    made = {name: numpy(value) for name, value in made.items()}
    logits = [np.log(each["classes"]) for each in (made, taught)]
    pairs = [np.log(np.hstack([each["yes"], 1 - each["yes"]])) for each in (made, taught)]
    expected = nncf_softmax_loss(*logits, 1, 2.0) + nncf_softmax_loss(*pairs, 1, 2.0)
    assert found[0] - found[1] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("last", "kind"),
    [
        (lambda x: layers.Dense(3, activation="softmax")(x), "softmax"),
        (lambda x: layers.Softmax()(x), "softmax"),
        (lambda x: keras.ops.softmax(x), "softmax"),
        (lambda x: layers.Activation("sigmoid")(x), "sigmoid"),
        (lambda x: layers.Activation("linear", dtype="float32")(layers.Softmax()(x)), "softmax"),
        (lambda x: layers.Identity()(keras.ops.sigmoid(x)), "sigmoid"),
        (lambda x: layers.Dense(3)(x), "logits"),
        (lambda x: x, "logits"),
    ],
)
def test_what_an_output_is_read_from_the_graph(last, kind):
    inputs = keras.Input((3,))
    model = keras.Model(inputs, last(inputs))
    student = kc.compress_model(
        model,
        {"compression": [distillation(), {"algorithm": "quantization", "quantize_outputs": True}]}
        if kind == "softmax"
        else {"compression": distillation()},
        np.ones((2, 3), "float32"),
        verbose=False,
    )
    assert student.progress["knowledge_distillation"]["outputs"] == [kind]


def test_segmentation_behind_a_softmax():
    inputs = keras.Input((4, 4, 1))
    model = keras.Model(inputs, layers.Conv2D(3, 1, activation="softmax")(inputs))
    student = kc.compress_model(model, {"compression": distillation()}, verbose=False)
    student.compile("sgd", "mse")
    x = RANDOM.normal(size=(2, 4, 4, 1)).astype("float32")
    found, outputs = added(student, x, np.zeros((2, 4, 4, 3), "float32"))
    logits = np.log(outputs).reshape(-1, 3)
    assert found == pytest.approx(nncf_softmax_loss(logits, logits, 1, 1.0), rel=1e-4)


def test_half_precision_losses_are_computed_in_float32():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4,))
    model = keras.Model(inputs, layers.Dense(3, dtype="mixed_bfloat16")(inputs))
    student = kc.compress_model(model, {"compression": distillation(scale=1e4)}, verbose=False)
    x = RANDOM.normal(size=(4, 4)).astype("float32")
    loss = student.config.algorithms[0].loss(student, x, student(x))
    assert keras.backend.standardize_dtype(loss.dtype) == "float32"
    made = numpy(keras.ops.cast(student(x), "float32"))
    assert float(numpy(loss)) == pytest.approx(nncf_softmax_loss(made, made, 1e4, 1.0), rel=1e-4)


def test_another_teacher_with_the_same_inputs_and_outputs():
    student = compressed(network(), distillation(type="mse"))
    inputs = keras.Input((8, 8, 1))
    wide = keras.Model(inputs, layers.Dense(4)(layers.Flatten()(inputs)))
    student.set_teacher(wide)
    found, outputs = added(student)
    expected = np.mean((outputs - wide.predict(IMAGES[:8], verbose=0)) ** 2)
    assert found == pytest.approx(expected, rel=1e-4)


# ---------------------------------------------------------------- errors


def test_teachers_that_do_not_fit():
    student = compressed(network(), distillation(features={"target_scopes": ["relu"]}))
    inputs = keras.Input((8, 8, 1))
    flat = layers.Flatten()(inputs)
    with pytest.raises(ValueError, match=r"with the outputs of .*\(None, 4\).*\(None, 5\)"):
        student.set_teacher(keras.Model(inputs, layers.Dense(5)(flat)))
    with pytest.raises(ValueError, match="with the inputs of"):
        other = keras.Input((9, 8, 1))
        student.set_teacher(keras.Model(other, layers.Dense(4)(layers.Flatten()(other))))
    with pytest.raises(ValueError, match=r"which lacks \['relu'\]"):
        student.set_teacher(keras.Model(inputs, layers.Dense(4)(flat)))
    with pytest.raises(TypeError, match="Expected a Keras 3 model"):
        student.set_teacher("float.keras")


def test_inner_tensors_need_the_call_before_the_loss():
    student = compressed(network(), distillation(features={"target_scopes": ["relu"]}))
    outputs = student(IMAGES[:8], training=True)
    student.compute_loss(IMAGES[:8], CLASSES[:8], outputs)
    with pytest.raises(ValueError, match="called on the batch with `training=True`"):
        student.compute_loss(IMAGES[:8], CLASSES[:8], outputs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": {"target_scopes": ["rellu"]}}, r"'rellu' matches no node.*'relu'"),
        ({"features": {"target_scopes": ["twice"]}}, r"called once.*\['twice'\]"),
        ({"features": {"ignored_scopes": ["{re}."]}}, r"Received: none"),
        ({"temperature": 0}, "expected a temperature above 0"),
        ({"type": "kl"}, "softmax"),
        ({"scale": -1}, "scale"),
    ],
)
def test_options_that_cannot_be_used(options, message):
    inputs = keras.Input((8,))
    twice = layers.Dense(8, name="twice")
    x = layers.ReLU(name="relu")(twice(twice(inputs)))
    model = keras.Model(inputs, layers.Dense(3)(x))
    with pytest.raises(kc.ConfigError, match=message):
        kc.compress_model(model, {"compression": distillation(**options)}, verbose=False)


def test_no_output_makes_sense_for_a_softmax():
    inputs = keras.Input((8,))
    model = keras.Model(inputs, layers.Dense(1, name="size")(inputs))
    with pytest.raises(kc.ConfigError, match=r"size.*\(None, 1\)"):
        kc.plan(model, {"compression": distillation()})


def test_a_learned_ranking_knows_no_teacher_and_no_other_losses():
    # Candidates of LeGR have masks and nothing else.
    model = network()
    model.compile("sgd", CROSS_ENTROPY)
    legr = {"generations": 2, "train_steps": 1, "population_size": 2, "num_samples": 1}
    pruning = {
        "algorithm": "filter_pruning",
        "params": {"interlayer_ranking_type": "learned_ranking", "legr_params": legr},
    }
    config = {"compression": [distillation(), pruning, {"algorithm": "rb_sparsity"}]}
    data = [(IMAGES[i : i + 8], CLASSES[i : i + 8]) for i in range(0, 48, 8)]
    student = kc.compress_model(model, config, data, verbose=False)
    assert student.progress["filter_pruning"]["ranking"]


def test_a_teacher_is_made_of_a_model_or_of_its_graph():
    model = network()
    for source in (model, trace(model)):
        outputs, features = Teacher(source).lesson(IMAGES, ("relu",))
        np.testing.assert_allclose(numpy(outputs), model.predict(IMAGES, verbose=0), rtol=1e-5)
        assert features[0].shape == (48, 8, 8, 16)
