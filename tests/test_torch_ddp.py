"""Two processes, each with data of its own, joined by `DistributedDataParallel`: one module."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest
from backend_helpers import BACKEND

if BACKEND != "torch":
    pytest.skip("keras_compress.torch needs Keras' torch backend", allow_module_level=True)

import torch

# Both processes run it, each with its rank. Weights begin at other values in each, so that what the
# processes agree on comes from training together; images of rank 1 are twice as large.
SCRIPT = """
import datetime, sys
import torch
import torch.distributed as distributed
import keras_compress.torch as kct
from torch_networks import ResNet18

rank, folder = int(sys.argv[1]), sys.argv[2]
at_most = datetime.timedelta(seconds=60)
distributed.init_process_group(
    "gloo", f"file://{folder}/meet", rank=rank, world_size=2, timeout=at_most
)
few = {"batchnorm_adaptation": {"num_bn_adaptation_samples": 0}, "range": {"num_init_samples": 16}}
quantization = {"algorithm": "quantization", "initializer": few}
params = {"pruning_target": 0.5, "round_to": 1, "pruning_steps": 3}
params |= {"prune_first_conv": True, "prune_downsample_convs": True}
pruning = {"algorithm": "filter_pruning", "params": params}
taylor = pruning | {"params": params | {"filter_importance": "taylor"}}
magnitude = {
    "algorithm": "magnitude_sparsity",
    "params": {"sparsity_target": 0.6, "sparsity_target_epoch": 3},
}


def train(name, algorithms, calibrated=True, sizes=(8, 8), positive=None, steps=8, finish=False):
    generator = torch.Generator().manual_seed(rank + 1)

    def batch():
        x = torch.randn(sizes[rank], 3, 16, 16, generator=generator) * (1 + rank)
        return x.abs() if positive == rank else x

    torch.manual_seed(rank)
    network = ResNet18(width=4, blocks=(1, 1)).train()
    data = [batch(), batch()] if calibrated else None
    module = kct.compress_model(network, {"compression": algorithms}, batch(), data=data)
    parallel = torch.nn.parallel.DistributedDataParallel(module)
    compression = kct.Compression(parallel, steps_per_epoch=2)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.02, momentum=0.9)
    course = []
    for _ in range(steps):
        optimizer.zero_grad()
        x = batch()
        outputs = parallel(x)
        loss = torch.nn.functional.cross_entropy(outputs, torch.arange(len(x)) % 5)
        (loss + compression.loss(x, outputs)).backward()
        optimizer.step()
        compression.step()
        course.append({k: float(v) for k, v in compression.statistics().items()})
    if finish:
        compression.finish()
    found = [module.state_dict(), [n for n, _ in module.named_buffers()]]
    torch.save([*found, course, compression.state_dict()], f"{folder}/{name}{rank}.pt")
    distributed.barrier()


train("calibrated", [pruning, magnitude, quantization])
train("taylor", [taylor, quantization])
everything = [pruning, magnitude, quantization]
train("from training", everything, calibrated=False)
train("from training, rank 0 later", everything, calibrated=False, sizes=(4, 8))
train("from training, rank 1 later", everything, calibrated=False, sizes=(8, 4))
train("ended early", [quantization], calibrated=False, steps=1, finish=True)
train("signs", [quantization], positive=0)
distributed.destroy_process_group()
"""
# Goes on from what rank 0 saved after an epoch; rank 1 ends without a word before a step.
LOST = """
import datetime, os, pathlib, signal, sys
import torch
import torch.distributed as distributed
import keras_compress.torch as kct
from torch_networks import ResNet18

rank, folder = int(sys.argv[1]), pathlib.Path(sys.argv[2])
last_step = int(sys.argv[3]) if len(sys.argv) > 3 else None
meet, saved = folder / f"meet{last_step}", folder / "state.pt"
at_most = datetime.timedelta(seconds=60)
distributed.init_process_group("gloo", f"file://{meet}", rank=rank, world_size=2, timeout=at_most)
pruning = {"pruning_target": 0.5, "round_to": 1, "pruning_steps": 3, "prune_first_conv": True}
magnitude = {"sparsity_target": 0.6, "sparsity_target_epoch": 3}
config = {"compression": [
    {"algorithm": "filter_pruning", "params": pruning},
    {"algorithm": "magnitude_sparsity", "params": magnitude},
    {"algorithm": "quantization"},
]}
torch.manual_seed(0)
x = torch.randn(32, 3, 16, 16)
network = ResNet18(width=4, blocks=(1, 1)).train()
module = kct.compress_model(network, config, x[:2], data=x)
parallel = torch.nn.parallel.DistributedDataParallel(module)
compression = kct.Compression(parallel, steps_per_epoch=2)
optimizer = torch.optim.SGD(parallel.parameters(), lr=0.02, momentum=0.9)
parts, done = {"module": module, "optimizer": optimizer, "compression": compression}, 0
if saved.exists():
    state = torch.load(saved, weights_only=False)
    done = state.pop("epochs")
    for name, part in parts.items():
        part.load_state_dict(state[name])
for epoch in range(done, 4):
    for batch in x.split(16):
        if rank == 1 and last_step == 2 * epoch + 1:
            os.kill(os.getpid(), signal.SIGKILL)
        optimizer.zero_grad()
        outputs = parallel(batch[rank::2])
        loss = torch.nn.functional.cross_entropy(outputs, torch.arange(8) % 5)
        (loss + compression.loss(batch, outputs)).backward()
        optimizer.step()
        compression.step()
    if rank == 0:
        state = {name: part.state_dict() for name, part in parts.items()}
        torch.save(state | {"epochs": epoch + 1}, folder / ".state.pt")
        os.replace(folder / ".state.pt", saved)
torch.save(module.state_dict(), folder / f"end{rank}.pt")
distributed.barrier()
distributed.destroy_process_group()
"""
TESTS = pathlib.Path(__file__).parent


def run(script, folder, *arguments):
    """Run a script in two processes, each with its rank; returns exit codes and what they said."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "KERAS_BACKEND": "torch"}
    folders = [str(TESTS), str(TESTS.parent), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, folders))
    command, started = [sys.executable, "-c", script], []
    for rank in (0, 1):
        with open(folder / f"{rank}.txt", "w") as errors:
            whole = [*command, str(rank), str(folder), *arguments]
            started.append(subprocess.Popen(whole, env=environment, stderr=errors))
    try:
        codes = [process.wait(timeout=240) for process in started]
    finally:
        for process in started:
            process.kill()
    return codes, [(folder / f"{rank}.txt").read_text()[-2000:] for rank in (0, 1)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Return a function of a name in the script: what the two processes had in the end."""
    folder = tmp_path_factory.mktemp("ranks")
    codes, said = run(SCRIPT, folder)
    assert codes == [0, 0], said

    def of(name):
        return [torch.load(folder / f"{name}{rank}.pt", weights_only=False) for rank in (0, 1)]

    return of


def different(ranks):
    """Return the names of the entries of the modules' state that differ between two ranks.

    Running statistics of batch norms are left out: `DistributedDataParallel` has each process
    update its own, and gives all those of rank 0 before the next step.
    """
    (one, buffers, *_), (other, *_) = ranks
    assert one.keys() == other.keys()

    def same(name):
        is_tensor = torch.is_tensor(one[name])
        return torch.equal(one[name], other[name]) if is_tensor else one[name] == other[name]

    return [name for name in one if name not in buffers and not same(name)]


def masks(state):
    return {name: value for name, value in state.items() if "mask" in name and value.numel() > 1}


@pytest.mark.parametrize("name", ["calibrated", "taylor"])
def test_weights_masks_and_ranges_are_equal(ranks, name):
    found = ranks(name)
    assert different(found) == []
    (state, buffers, course, progress), (other, _, other_course, other_progress) = found
    assert sum(key.endswith("scale") for key in state) == 15
    assert (course, progress) == (other_course, other_progress)
    # They saw other images:
    assert not any(torch.equal(state[key], other[key]) for key in buffers if "running" in key)


@pytest.mark.parametrize("name", ["calibrated", "taylor"])
def test_masks_moved_on_both(ranks, name):
    for state, _, course, _ in ranks(name):
        levels = [step["pruning_level"] for step in course]
        assert levels == sorted(levels) and len(set(levels)) > 2 and levels[-1] == 0.5
        assert any(not value.all() for value in masks(state).values())
        if name == "calibrated":
            sparsities = [step["sparsity"] for step in course]
            assert sparsities == sorted(sparsities) and len(set(sparsities)) == 4
            assert sparsities[-1] == pytest.approx(0.6, abs=1e-3)


@pytest.mark.parametrize(
    "name",
    [
        "from training",
        "from training, rank 0 later",
        "from training, rank 1 later",
        "ended early",
    ],
)
def test_ranges_from_the_first_batches_are_equal(ranks, name):
    found = ranks(name)
    assert all(value["calibrated"] for state, *_ in found for value in extra(state))
    assert different(found) == []


def test_signs_of_the_samples_are_those_of_the_first(ranks):
    found = ranks("signs")
    assert different(found) == []
    assert not all(value["signed"] for value in extra(found[1][0]))


def test_a_lost_process_ends_the_other_and_both_go_on_from_the_last_epoch(tmp_path):
    """Rank 1 is killed in the third of four epochs; training then ends as one without, bitwise."""
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    for folder in (undisturbed, disturbed):
        folder.mkdir()
    codes, said = run(LOST, undisturbed)
    assert codes == [0, 0], said
    codes, said = run(LOST, disturbed, "5")
    assert codes[0] > 0 and codes[1] == -signal.SIGKILL
    assert "RuntimeError" in said[0] and "gloo" in said[0]
    assert torch.load(disturbed / "state.pt", weights_only=False)["epochs"] == 2
    codes, said = run(LOST, disturbed)
    assert codes == [0, 0], said
    expected = torch.load(undisturbed / "end0.pt", weights_only=False)
    assert any(not value.all() for value in masks(expected).values())
    for rank in (0, 1):
        actual = torch.load(disturbed / f"end{rank}.pt", weights_only=False)
        running = [name for name in expected if "running" in name] if rank else []
        assert different([(expected, running), (actual, running)]) == []


def extra(state):
    """Return what the quantizers know beside their variables."""
    return [value for name, value in state.items() if name.endswith("_extra_state") and value]
