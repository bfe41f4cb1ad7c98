"""Files are data: nothing that a model or a configuration says is run, and no code can say so."""

import ast
import importlib
import json
import os
import pathlib
import pickle
import sys
import textwrap
import warnings
import zipfile

import keras
import numpy as np
import pytest
from backend_helpers import BACKEND, numpy
from keras import layers
from typer.testing import CliRunner

import keras_compress as kc
from keras_compress import cli
from keras_compress.export import child
from keras_compress.graph.weight_map import copy_model

ROOT = pathlib.Path(keras.__file__)
LIBRARY = pathlib.Path(kc.__file__).parent
SOURCES = sorted([*LIBRARY.rglob("*.py"), *(LIBRARY.parent / "examples").rglob("*.py")])
MODULES = {"pickle", "_pickle", "marshal", "dill", "cloudpickle", "joblib", "shelve", "yaml"}
CALLS = {"eval", "exec", "compile", "__import__"}  # of Python's own
ATTRIBUTES = {"enable_unsafe_deserialization", "system", "popen", "import_module"}
IMPORTERS = {  # what may import a module whose name is not written in the source, and why
    "cli.py": "`--import`, which the user writes",
    "export/child.py": "the modules of layers that the user's session holds",
}


def violations(source):
    """Return what a source text does that could run what a file says."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [getattr(node, "module", None) or ""] + [each.name for each in node.names]
            found += [name for name in names if name.partition(".")[0] in MODULES]
        elif isinstance(node, ast.Call):
            found += _of_call(node)
        elif isinstance(node, ast.Attribute) and node.attr in ATTRIBUTES:
            found.append(node.attr)
    return found


def _of_call(node):
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    owner = ast.unparse(node.func).rpartition(".")[0]
    given = {each.arg: ast.unparse(each.value) for each in node.keywords}
    if isinstance(node.func, ast.Name) and name in CALLS:
        yield name
    for keyword, allowed in (("safe_mode", "True"), ("allow_pickle", "False"), ("shell", "False")):
        if given.get(keyword, allowed) != allowed:
            yield f"{keyword}={given[keyword]}"
    if owner == "torch" and name == "load" and given.get("weights_only") != "True":
        yield "torch.load"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(LIBRARY.parent)))
def test_no_source_runs_what_a_file_says(path):
    allowed = set()
    if path.is_relative_to(LIBRARY) and str(path.relative_to(LIBRARY)) in IMPORTERS:
        allowed = {"import_module"}
    assert not set(violations(path.read_text(encoding="utf-8"))) - allowed


@pytest.mark.parametrize(
    "source",
    [
        "eval(text)",
        "exec(text)",
        "compile(text, '', 'exec')",
        "__import__(name)",
        "import pickle",
        "from marshal import loads",
        "import yaml as y",
        "keras.models.load_model(path, safe_mode=False)",
        "keras.models.load_model(path, safe_mode=mode)",
        "keras.config.enable_unsafe_deserialization()",
        "np.load(path, allow_pickle=True)",
        "subprocess.run(command, shell=True)",
        "os.system(command)",
        "os.popen(command)",
        "torch.load(path)",
        "importlib.import_module(name)",
    ],
)
def test_what_is_forbidden_is_found(source):
    assert violations(source)


def test_what_is_allowed_is_not_found():
    source = """
        model.compile("adam")
        module.eval()
        np.load(path)
        keras.models.load_model(path, safe_mode=True)
        torch.load(path, weights_only=True)
        subprocess.run([sys.executable, path])
    """
    assert violations(textwrap.dedent(source)) == []


# Files of models


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working directory, where a file named `marker` shows that code has run."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def good(folder):
    """The file of a compressed, compiled model."""
    inputs = keras.Input((4,), name="features")
    model = keras.Model(inputs, layers.Dense(3, activation="relu", name="dense")(inputs))
    config = {"compression": {"algorithm": "quantization"}}
    data = np.ones((2, 4), "float32")
    compressed = kc.compress_model(model, config, data=data, verbose=False)
    compressed.compile("adam", "mse")
    compressed.train_on_batch(data, np.ones((2, 3)))
    compressed.save(folder / "good.keras")
    return folder / "good.keras"


def changed(good, change=None, members=None):
    """Return the file of a model whose `config.json` was changed, or which has more members."""
    target = good.with_name("hostile.keras")
    with zipfile.ZipFile(good) as source, zipfile.ZipFile(target, "w") as out:
        for name in source.namelist():
            data = source.read(name)
            if name == "config.json" and change is not None:
                config = json.loads(data)
                change(config)
                data = json.dumps(config).encode()
            if name not in (members or {}):
                out.writestr(name, data)
        for name, data in (members or {}).items():
            out.writestr(name, data)
    return target


def dense_of(config):
    return next(each for each in config["config"]["layers"] if each["name"] == "dense")


def named(module, name, config=None):
    """Return how Keras writes an object of some class: here of one that is none of its own."""
    return {"module": module, "class_name": name, "config": config, "registered_name": name}


def function(module, name):
    return {"module": module, "class_name": "function", "config": name, "registered_name": name}


TOUCH = "touch marker"
OBJECTS = {
    "os.system": named("os", "system", {"command": TOUCH}),
    "posix.system": named("posix", "system", {"command": TOUCH}),
    "subprocess.Popen": named("subprocess", "Popen", {"args": TOUCH, "shell": True}),
    "builtins.eval": named("builtins", "eval", {"source": "open('marker', 'w')"}),
    "builtins.exec": named("builtins", "exec", "open('marker', 'w')"),
    "a function of os": function("os", "system"),
    "a function of builtins": function("builtins", "exec"),
    "a function of keras": function("keras.utils", "get_file"),
    "unsafe mode": function("keras.config", "enable_unsafe_deserialization"),
    "a module of keras": named("keras.src.utils.file_utils", "get_file", {"fname": "marker"}),
    "a module of the library": named("keras_compress.export.child", "run", {"job": {}}),
    "the command line": named("keras_compress.cli", "main", {}),
}


def lambda_layer(good):
    """Return the file of a model with a function in it, as Keras saves it, that leaves a marker."""
    layer = layers.Lambda(lambda x: (open("marker", "w"), x)[1], output_shape=(4,))  # noqa: SIM115
    inputs = keras.Input((4,), name="features")
    keras.Model(inputs, layer(inputs)).save(good.with_name("lambda.keras"))
    pathlib.Path("marker").unlink(missing_ok=True)  # of the call above
    return good.with_name("lambda.keras")


def require_refused(path, folder):
    """Check that nothing loads a file, and that nothing of it ran."""
    with pytest.raises(Exception, match=".") as caught:
        keras.models.load_model(path)
    assert not isinstance(caught.value, (SystemExit, KeyboardInterrupt))
    for arguments in (("report", path), ("export", path, folder / "model.xml")):
        result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr.startswith("keras-compress: ") and result.stderr.count("\n") == 1
    job = {"modules": [], "model": str(path), "path": str(folder / "model.xml")}
    with pytest.raises(Exception, match="."):
        child.run(job | {"input_names": ["x"], "output_names": ["y"], "metadata": {}})
    assert not (folder / "marker").exists() and not (folder / "model.xml").exists()


def test_the_good_file_is_loaded(good):
    keras.models.load_model(changed(good, lambda config: None))


def test_a_function_in_a_file_is_refused(good, folder):
    require_refused(lambda_layer(good), folder)


@pytest.mark.parametrize("hostile", OBJECTS.values(), ids=OBJECTS)
@pytest.mark.parametrize(
    "place",
    [
        lambda config, hostile: dense_of(config).update(hostile),
        lambda config, hostile: dense_of(config)["config"].update(activation=hostile),
        lambda config, hostile: dense_of(config)["config"].update(kernel_initializer=hostile),
        lambda config, hostile: dense_of(config)["config"]["transforms"].update(kernel=[hostile]),
        lambda config, hostile: config["config"]["layers"][1]["config"].update(quantizer=hostile),
        lambda config, hostile: config.update(hostile),
    ],
    ids=["layer", "activation", "initializer", "transform", "quantizer", "model"],
)
def test_objects_of_other_modules_are_refused(place, hostile, good, folder):
    path = changed(good, lambda config: place(config, hostile))
    with pytest.raises((ValueError, TypeError)):
        keras.models.load_model(path)
    assert not (folder / "marker").exists()


@pytest.mark.parametrize("name", ["os.system", "builtins.exec", "a function of keras"])
def test_objects_of_other_modules_are_refused_everywhere(name, good, folder):
    hostile = OBJECTS[name]
    require_refused(changed(good, lambda config: dense_of(config).update(hostile)), folder)


@pytest.mark.parametrize("hostile", OBJECTS.values(), ids=OBJECTS)
@pytest.mark.parametrize("key", ["optimizer", "loss"])
def test_a_compilation_may_name_none_either(key, hostile, good, folder):
    path = changed(good, lambda config: config["compile_config"].update({key: hostile}))
    with pytest.raises((ValueError, TypeError)):
        keras.models.load_model(path)
    assert keras.models.load_model(path, compile=False).name
    assert not (folder / "marker").exists()


class Marks:
    """Leaves a marker when it is unpickled."""

    def __reduce__(self):
        return open, ("marker", "w")


def test_pickles_are_not_read(good, folder):
    pickled = pickle.dumps(Marks())
    model = keras.models.load_model(changed(good, members={"data.pkl": pickled}))
    assert model.name and not (folder / "marker").exists()
    for member in ("model.weights.h5", "config.json"):
        require_refused(changed(good, members={member: pickled}), folder)
    (folder / "raw.keras").write_bytes(pickled)
    require_refused(folder / "raw.keras", folder)


def test_archives_write_nothing_outside(good, folder):
    inside = folder / "inside"
    inside.mkdir()
    os.chdir(inside)
    names = ("../marker", "assets/../../marker", "/" + str(folder / "marker").lstrip("/"))
    path = changed(good, members=dict.fromkeys(names, b"x"))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Skipping invalid path", UserWarning)
        keras.models.load_model(path)
    assert not (folder / "marker").exists() and not list(inside.iterdir())


def test_a_model_names_no_other_file(good, folder):
    """Its configuration is data, where `compress_model` takes a path as well."""
    (folder / "secret.json").write_text('{"compression": {"algorithm": "nothing", "secret": 1}}')
    secret = {"config": str(folder / "secret.json")}
    path = changed(good, lambda config: config["config"].update(compression=secret))
    with pytest.raises(ValueError, match="expected an object") as caught:
        keras.models.load_model(path)
    assert "nothing" not in str(caught.value)


def test_copies_of_models_are_loaded_in_safe_mode(folder):
    """Functions without a name pass by themselves, not as code, and keep their names."""
    factor = 3.0
    lambdas = [lambda x: x * factor, lambda x: x - 1]
    names = [each.__name__ for each in lambdas]
    inputs = keras.Input((4,))
    x = layers.Lambda(lambdas[0], output_shape=lambda shape: shape)(inputs)
    model = keras.Model(inputs, layers.Dense(2, activation=lambdas[1])(x))
    twin = copy_model(model)
    data = np.ones((2, 4), "float32")
    np.testing.assert_array_equal(numpy(twin(data)), numpy(model(data)))
    assert twin.layers[1].function is lambdas[0] and twin.layers[2].activation is lambdas[1]
    assert [each.__name__ for each in lambdas] == names


# What else is read


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('touch marker')",
        "import os; os.system('touch marker')",
        "!!python/object/apply:os.system ['touch marker']",
        "(function() { return 1 })()",
    ],
)
def test_configurations_are_data(text, folder):
    (folder / "config.json").write_text(text)
    with pytest.raises(kc.ConfigError, match="config.json: expected"):
        kc.Config.load(folder / "config.json")
    assert not (folder / "marker").exists()


def test_arrays_of_a_training_are_no_pickles(folder):
    from keras_compress.training.checkpoints import read_weights

    model = keras.Sequential([keras.Input((2,)), layers.Dense(1)])
    model.compile("sgd", "mse")
    np.savez(folder / "state.npz", **{"0": np.array([Marks()], dtype=object)})
    (folder / "marker").unlink(missing_ok=True)
    with pytest.raises(ValueError, match="allow_pickle=False"):
        read_weights(folder / "state.npz", model)
    assert not (folder / "marker").exists()


def test_reports_show_names_as_text(folder):
    name = "<img src=x onerror=alert(1)>"
    inputs = keras.Input((4,), name="features")
    model = keras.Model(inputs, layers.Dense(3, name="dense")(inputs), name=name)
    kc.report(model).save(folder / "report.html")
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert "<img src=x" not in text and "&lt;img src=x" in text


# Processes and modules


def test_a_child_process_gets_its_job_as_data(monkeypatch, folder):
    seen = []

    def pretend(command, **options):
        seen.append((command, options, json.loads(pathlib.Path(command[-1]).read_text())))
        return type("Result", (), {"returncode": 0, "stderr": ""})

    monkeypatch.setattr(child.subprocess, "run", pretend)
    inputs = keras.Input((4,), name="'; import os; '")
    model = keras.Model(inputs, layers.Dense(3)(inputs))
    child.export_in_child(model, folder / "a'b.xml", ["x"], ["y"], {"config": {"a": 1}})
    ((command, options, job),) = seen
    assert command[:3] == [sys.executable, "-c", child.COMMAND] and len(command) == 4
    assert not options.get("shell") and job["path"].endswith("a'b.xml")


def test_a_child_process_gets_no_code(folder):
    def whole(x):
        if isinstance(x, keras.KerasTensor):
            raise ValueError("looks at values, so that tracing leaves the layer whole")
        return x

    layer = layers.Lambda(lambda x: whole(x), output_shape=(4,), name="whole")
    inputs = keras.Input((4,))
    model = keras.Model(inputs, layers.Dense(3)(layer(inputs)))
    with pytest.raises(ValueError, match="'whole' .Lambda. holds a Python lambda"):
        child.export_in_child(model, folder / "model.xml", ["x"], ["y"], {})


LAYERS = """
import pathlib

import keras

pathlib.Path("marker").touch()


@keras.saving.register_keras_serializable("trust")
class Doubling(keras.layers.Layer):
    def call(self, inputs):
        return inputs * 2.0
"""


@pytest.fixture
def own_layers(folder, monkeypatch):
    """A module `own_layers`, not imported, and `own.keras`, a model with a layer of its own."""
    (folder / "own_layers.py").write_text(LAYERS)
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    module = importlib.import_module("own_layers")
    inputs = keras.Input((4,), name="features")
    x = module.Doubling(name="doubling")(inputs)
    keras.Model(inputs, layers.Dense(3)(x)).save(folder / "own.keras")
    (folder / "marker").unlink()
    _forget()
    sys.path.remove(str(folder))
    (folder / "config.json").write_text('{"compression": {"algorithm": "quantization"}}')
    yield folder / "own.keras"
    _forget()


def _forget():
    sys.modules.pop("own_layers", None)
    keras.saving.get_custom_objects().pop("trust>Doubling", None)


COMMANDS = [("plan", "config.json"), ("report",), ("export", "model.xml", "--no-verify")]
if BACKEND != "tensorflow":
    COMMANDS = COMMANDS[:2]  # an export would start a process


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_the_command_line_imports_what_it_is_told_to(command, own_layers, folder):
    name, *rest = command
    plain = CliRunner().invoke(cli.app, [name, str(own_layers), *rest])
    assert plain.exit_code == 2 and "Doubling" in plain.stderr
    assert not (folder / "marker").exists() and "own_layers" not in sys.modules
    result = CliRunner().invoke(cli.app, [name, str(own_layers), *rest, "--import", "own_layers"])
    assert result.exit_code == 0, result.stderr
    assert (folder / "marker").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_layers.py", "Expected the name of a module"),
        ("not-a-name", "Expected the name of a module"),
        ("no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("failing", "--import failing, ZeroDivisionError: division by zero"),
    ],
)
def test_a_module_that_cannot_be_imported_is_named(name, message, own_layers, folder):
    (folder / "failing.py").write_text("1 / 0\n")
    result = CliRunner().invoke(cli.app, ["report", str(own_layers), "--import", name])
    assert (result.exit_code, result.stdout) == (2, "") and message in result.stderr
    assert result.stderr.count("\n") == 1
