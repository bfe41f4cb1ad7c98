"""Compressed models on two devices end as on one that sees the same batches; processes each.

Engines want fresh processes: `distributed_training.py` trains there, alone and by the engine, and
writes what came of both. `test_torch_ddp.py` does the same for torch.
"""

import importlib.util
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys

import numpy as np
import openvino as ov
import pytest
from backend_helpers import BACKEND
from example_helpers import EXAMPLES

from keras_compress.export.verify import compile_on_cpu

if BACKEND != "tensorflow":
    pytest.skip("engines are started from TensorFlow's suite, once", allow_module_level=True)

TESTS = pathlib.Path(__file__).resolve().parent
CASES = {
    "mirrored": ["masked", "first batches", "drawn", "taylor", "shrunk", "resumed", "batch norm"],
    "multi-worker": ["masked", "first batches", "drawn", "taylor"],
    "data-parallel": ["masked", "first batches", "resumed"],
    "model-parallel": ["masked", "drawn", "resumed"],
}
ENGINES = list(CASES)
EVERY_CASE = [(engine, case) for engine, cases in CASES.items() for case in cases]
every_case = pytest.mark.parametrize(("engine", "case"), EVERY_CASE)
STEPS, EPOCHS = 16, 4  # in all


def started(arguments, folder, number, program="distributed_training.py"):
    """Start a program; returns the process and the file with what it says."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    folders = [str(TESTS.parent), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, folders))
    said = folder / f"said{number}.txt"
    command = [sys.executable, str(TESTS / program), *arguments]
    with said.open("w") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
    return process, said


def ended(processes):
    """Wait for processes; returns the exit code of each."""
    try:
        return [process.wait(timeout=400) for process, _ in processes]
    finally:
        for process, _ in processes:
            process.kill()


def finished(processes):
    """Wait for processes, which must end well."""
    codes = ended(processes)
    assert not any(codes), "\n".join(said.read_text()[-3000:] for _, said in processes)


def workers():
    """Return the names of two workers that know each other."""
    ports = ":".join(map(str, free_ports(2)))
    return [f"multi-worker:{rank}:{ports}" for rank in (0, 1)]


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """Return a function of an engine: the folders, one per process, with what it wrote."""
    made = {}

    def run(engine):
        if engine in made:
            return made[engine]
        if engine.endswith("parallel") and importlib.util.find_spec("jax") is None:
            pytest.skip("jax is not installed: `pip install keras-compress[jax]`")
        folder = tmp_path_factory.mktemp(engine)
        names = workers() if engine == "multi-worker" else [engine]
        finished(
            [
                started([name, str(folder), *CASES[engine]], folder, number)
                for number, name in enumerate(names)
            ]
        )
        made[engine] = [folder / "0", folder / "1"] if len(names) > 1 else [folder]
        return made[engine]

    return run


def arrays(folder, case, kind):
    """Return {path: array} of the weights of a kind: `expected`, `actual` or `start`."""
    with np.load(folder / f"{case}.npz") as file:
        return {k.removeprefix(f"{kind} "): file[k] for k in file if k.startswith(f"{kind} ")}


def told(folder, case):
    return json.loads((folder / f"{case}.json").read_text())


def is_mask(path):
    return path.rpartition("/")[2].startswith("mask")


def differences(actual, expected):
    return {k: np.abs(actual[k].astype("float64") - v).max() for k, v in expected.items()}


@every_case
def test_weights_ranges_and_masks_are_those_of_one_device(engine, case, folder_of):
    if case == "batch norm":
        return  # see `test_batch_norm_of_each_replica`
    for folder in folder_of(engine):
        actual, expected = (arrays(folder, case, kind) for kind in ("actual", "expected"))
        assert actual.keys() == expected.keys()
        # A loss of masks that counted twice would move logits by 0.01 (see `SEED` there).
        tolerance = 2e-3 if case == "drawn" else 5e-5
        for path, difference in differences(actual, expected).items():
            assert difference <= (0 if is_mask(path) else tolerance), path
        assert any(path.endswith("scale") for path in actual)


@every_case
def test_training_moved_masks_and_weights(engine, case, folder_of):
    """What is compared is not what training began with."""
    folder = folder_of(engine)[0]
    actual, start = (arrays(folder, case, kind) for kind in ("actual", "start"))
    if case == "shrunk":
        assert actual["first/kernel"].size < start["first/kernel"].size
        return
    moved = differences(actual, start)
    assert moved["first/kernel"] > 1e-3
    assert moved["first/symmetric_quantizer/scale"] > 1e-5
    if case == "drawn":
        assert moved["first/rb_sparsity_mask/logits"] > 1e-3
    else:
        assert any(is_mask(path) and not value.all() for path, value in actual.items())


@every_case
def test_progress_and_statistics_are_those_of_one_device(engine, case, folder_of):
    for folder in folder_of(engine):
        actual, expected = (told(folder, case)[kind] for kind in ("actual", "expected"))
        assert actual["progress"] == expected["progress"]
        steps = STEPS * (2 if case == "shrunk" else 1)  # which is trained once more
        assert actual["steps"] == expected["steps"] == steps
        if case == "batch norm":
            continue
        if engine == "multi-worker":  # a loop of its own, which logs the loss of every step
            means = np.reshape(actual["history"]["loss"], (EPOCHS, -1)).mean(axis=1)
            np.testing.assert_allclose(means, expected["history"]["loss"], 1e-5)
            continue
        assert actual["history"].keys() == expected["history"].keys()
        for key, values in expected["history"].items():
            last = values[-len(actual["history"][key]) :]  # of a resumed training
            np.testing.assert_allclose(actual["history"][key], last, 1e-4, 1e-6, err_msg=key)


@pytest.mark.parametrize("engine", [name for name, cases in CASES.items() if "resumed" in cases])
def test_a_resumed_training_ends_bitwise_as_the_other(engine, folder_of):
    (folder,) = folder_of(engine)
    once, resumed = (arrays(folder, case, "actual") for case in ("masked", "resumed"))
    assert not any(differences(resumed, once).values())
    assert len(told(folder, "resumed")["actual"]["history"]["loss"]) == EPOCHS - 2


@pytest.mark.parametrize(
    ("engine", "case"), [pair for pair in EVERY_CASE if "parallel" not in pair[0]]
)
def test_replicas_are_equal(engine, case, folder_of):
    """All variables of both devices, or of both processes, but statistics that each makes alone."""
    folders = folder_of(engine)
    own = ("moving_mean", "moving_variance") if case == "batch norm" else ()
    for folder in folders:
        placed = told(folder, case)["actual"]["placed"]
        assert [k for k, same in placed.items() if not same and not k.endswith(own or "-")] == []
    first, *others = (arrays(folder, case, "actual") for folder in folders)
    for other in others:
        assert not any(differences(other, first).values())


def test_batch_norm_of_each_replica(folder_of):
    """Keras' default: each takes statistics of its own samples, and keeps those for itself."""
    (folder,) = folder_of("mirrored")
    placed = told(folder, "batch norm")["actual"]["placed"]
    different = sorted(path for path, same in placed.items() if not same)
    assert different == ["norm/moving_mean", "norm/moving_variance"]
    # Adaptation runs before training, on whole batches: as on one device.
    one, mirrored = (arrays(folder, case, "start") for case in ("masked", "batch norm"))
    for path in different:
        np.testing.assert_allclose(mirrored[path], one[path], 1e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_strip_and_shrink_afterwards(engine, folder_of):
    folder = folder_of(engine)[0]
    with np.load(folder / "masked.npz") as file:
        expected = file["outputs of one device"]
        np.testing.assert_allclose(file["plain"], expected, atol=1e-4 * np.ptp(expected))
        np.testing.assert_allclose(file["shrunk"], expected, atol=1e-4 * np.ptp(expected))


@pytest.mark.parametrize("engine", ENGINES)
def test_export_is_that_of_one_device(engine, folder_of):
    folder = folder_of(engine)[0]
    report = json.loads((folder / "model.verify.json").read_text())
    assert all(output["relative"] < 1e-3 for output in report["outputs"])
    x = np.random.default_rng(1).normal(size=(8, 6, 6, 3)).astype("float32")
    paths = (folder / "model.xml", folder / "expected.xml")
    actual, expected = (compile_on_cpu(ov.Core(), path)(x)[0] for path in paths)
    np.testing.assert_allclose(actual, expected, atol=0.02 * np.ptp(expected))


def test_layouts_of_the_plain_model_hold_for_the_compressed_one(folder_of):
    """Weights lie as the plain model's do, by its paths, and what transforms them lies alike."""
    (folder,) = folder_of("model-parallel")
    placed = told(folder, "masked")["actual"]["placed"]
    split = {path: spec for path, spec in placed.items() if any(spec)}
    by_channel = [None, None, None, "model"]
    assert split == {
        "second/kernel": by_channel,
        "second/magnitude_sparsity_mask/mask": by_channel,
        "second/symmetric_quantizer_1/scale": by_channel,
        "second/bias": ["model"],
        "second/channel_mask_4/mask_1": ["model"],
        "head/kernel": ["model", None],
        "head/magnitude_sparsity_mask/mask": ["model", None],
    }
    logits = told(folder, "drawn")["actual"]["placed"]["second/rb_sparsity_mask/logits"]
    assert logits == by_channel


def test_weights_of_inner_models_lie_as_before(folder_of):
    """The layout is for `inner/inside/kernel`; the flat model calls it `inner-inside/kernel`."""
    (folder,) = folder_of("model-parallel")
    placed = told(folder, "masked")["actual"]["nested"]
    assert placed["inner-inside/kernel"] == [None, "model"]
    inside = [path for path in placed if path.startswith("inner-inside/symmetric_quantizer")]
    assert [placed[path] for path in inside] == [[None, "model"]]
    assert not any(placed["inner-inside/bias"])


def test_a_lost_worker_ends_the_others_and_all_go_on_from_the_last_epoch(tmp_path):
    """The second is killed in the third of four epochs; the training then ends as one without."""

    def both(name, *last_step):
        (tmp_path / name).mkdir(exist_ok=True)
        return [
            started([worker, str(tmp_path / name), *last_step], tmp_path, number, "lost_worker.py")
            for number, worker in enumerate(workers())
        ]

    finished(both("undisturbed"))
    processes = both("disturbed", "10")
    first, second = ended(processes)
    assert second == -signal.SIGKILL and first > 0  # which is told, and does not wait for ever
    assert "UnavailableError" in processes[0][1].read_text()
    assert [path.name for path in (tmp_path / "disturbed").iterdir()] == ["model.weights.h5"]
    finished(both("disturbed"))
    with np.load(tmp_path / "undisturbed" / "end0.npz") as expected:
        assert not expected["second/channel_mask_4/mask_1"].all()
        for rank in (0, 1):
            with np.load(tmp_path / "disturbed" / f"end{rank}.npz") as actual:
                assert not any(differences(actual, expected).values())


def test_fit_and_searches_are_refused_with_several_workers(folder_of):
    """Keras' own `fit` fails there; the error says what to write instead."""
    for folder in folder_of("multi-worker"):
        found = told(folder, "refused")
        assert re.search(r"Expected a training loop of your own.*`fit` of model", found["fit"])
        assert re.search(r"without a search.*filter_pruning.*load_model", found["search"])
        assert found["steps"] == 0


def test_shrinking_within_fit_is_refused_with_several_replicas(folder_of):
    (folder,) = folder_of("mirrored")
    found = told(folder, "refused")
    assert re.search(r"Expected `shrink=False`.*Between two calls of `fit`", found["shrink"])


def test_the_example_says_how_far_apart_they_end():
    result = subprocess.run(
        [sys.executable, "distributed.py", "--engine", "mirrored", "--epochs", "1"]
        + ["--samples", "128"],
        cwd=EXAMPLES,
        env=os.environ | {"PYTHONPATH": str(TESTS.parent)},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    rows = dict(line.split(": ", 1) for line in result.stdout.splitlines() if ": " in line)
    assert rows["values of masks that differ"].startswith("0 of ")
    assert float(rows["weights, largest difference"]) < 1e-4
    assert float(rows["ranges, largest difference"]) < 1e-4
    assert float(rows["IR and model, largest difference of range"]) < 1e-3
