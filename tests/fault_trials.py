"""Kills a training at random points, lets it go on, and compares it with one that was not killed.

A process that has imported everything and computed nothing yet is forked for every training, so
that none waits for TensorFlow's import. `run_trials` is what tests and the benchmark call.
"""

import collections
import dataclasses
import functools
import json
import mmap
import multiprocessing
import os
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import zipfile

import fault_training
import h5py
import keras
import openvino
import tensorflow as tf

import keras_compress as kc
from keras_compress.algorithms import FilterPruning, MagnitudeSparsity
from keras_compress.masks import ChannelMask
from keras_compress.weight_masks import WeightMask
from keras_compress.whole_files import ENDING

PHASES = ("start", "training", "mask update", "checkpoint", "export", "backup", "end")
AIMED = ("mask update", "checkpoint", "export", "backup")
AFTER_SECONDS = 0.03  # longest time between a point that is aimed at and the kill
LOST = 120  # seconds after which a training that should have ended counts as hanging

# What runs in which phase.
BOUNDS = (
    (FilterPruning, "set_level", "mask update"),
    (MagnitudeSparsity, "set_level", "mask update"),
    (keras.callbacks.ModelCheckpoint, "on_epoch_end", "checkpoint"),
    (kc.callbacks.ExportIR, "on_epoch_end", "export"),
    (fault_training.SavedModel, "on_epoch_end", "export"),
    (kc.callbacks.Backup, "on_epoch_begin", "backup"),
    (kc.callbacks.Backup, "on_train_end", "backup"),
    (kc.CompressedModel, "fit", "training"),
)
# Calls that change variables or files: points to aim at.
POINTS = (
    (ChannelMask, "set_mask"),
    (WeightMask, "set_mask"),
    (zipfile.ZipFile, "close"),
    (h5py.File, "close"),
    (openvino, "save_model"),
    (tf.saved_model, "save"),
    (os, "replace"),
    (shutil, "rmtree"),
    (pathlib.Path, "write_text"),
)


class Board:
    """What a training and the process that kills it both see: phase, signal, counts of points."""

    def __init__(self):
        self.bytes = mmap.mmap(-1, 2 + 2 * len(PHASES))

    @property
    def phase(self):
        return PHASES[self.bytes[0]]

    @phase.setter
    def phase(self, name):
        self.bytes[0] = PHASES.index(name)

    @property
    def is_reached(self):
        return bool(self.bytes[1])

    def reach(self):
        self.bytes[1] = 1

    def count(self, phase):
        place = 2 + 2 * PHASES.index(phase)
        return int.from_bytes(self.bytes[place : place + 2], "little")

    def add(self):
        place = 2 + 2 * self.bytes[0]
        number = self.count(self.phase) + 1
        self.bytes[place : place + 2] = number.to_bytes(2, "little")
        return number


@dataclasses.dataclass(frozen=True)
class Aim:
    """The point to kill at: the number-th one of a phase, before it (held) or just after."""

    phase: str
    number: int
    held: bool


def watch(board, aim=None):
    """Have every phase and point of this process noted on a board; halt at the aim."""

    def bounded(function, phase):
        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            before, board.phase = board.phase, phase
            try:
                return function(*args, **kwargs)
            finally:
                board.phase = "end" if phase == "training" else before

        return wrapper

    def noted(function):
        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            phase, number = board.phase, board.add()
            if aim is not None and (phase, number) == (aim.phase, aim.number):
                board.reach()
                if aim.held:
                    if function is WRITE_TEXT:
                        function(args[0], args[1][: len(args[1]) // 2])
                    time.sleep(LOST)
            return function(*args, **kwargs)

        return wrapper

    for owner, name, phase in BOUNDS:
        setattr(owner, name, bounded(getattr(owner, name), phase))
    for owner, name in POINTS:
        setattr(owner, name, noted(getattr(owner, name)))


WRITE_TEXT = pathlib.Path.write_text


class Fork:
    """A function that runs in a fork of this process.

    Args:
        log: file that takes what it prints.
        function, *args: what runs.
    """

    def __init__(self, log, function, *args):
        self.log = log
        self.code = None
        self.pid = os.fork()
        if not self.pid:
            self._run(function, *args)

    def _run(self, function, *args):
        code = 1
        try:
            with open(self.log, "ab") as stream:
                os.dup2(stream.fileno(), 1)
                os.dup2(stream.fileno(), 2)
            function(*args)
            code = 0
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(code)

    @property
    def runs(self):
        if self.code is None:
            found, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if found else None
        return self.code is None

    def kill(self):
        """Kill it; return whether it had not ended by itself."""
        if self.runs:
            os.kill(self.pid, signal.SIGKILL)
            self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.code == -signal.SIGKILL

    def finish(self):
        """Wait for its end.

        Raises:
            RuntimeError: it failed, with what it printed.
        """
        begun = time.monotonic()
        while self.runs:
            if time.monotonic() - begun > LOST:
                self.kill()
            time.sleep(0.01)
        if self.code:
            raise RuntimeError(f"exit code {self.code}: {self.log.read_text()[-2000:]}")


def train_watched(folder, with_data, board, aim=None, record=False):
    """Train with a board that sees it."""
    watch(board, aim)
    fault_training.train(folder, with_data, record)


@dataclasses.dataclass(frozen=True)
class Reference:
    """The training that was not killed.

    Attributes:
        final: what it ended with.
        recorded: {final name: list of the contents that it had, epoch after epoch}.
        points: {phase: how many}.
        seconds: how long it took.
    """

    final: dict
    recorded: dict
    points: dict
    seconds: float

    @classmethod
    def of(cls, with_data):
        with tempfile.TemporaryDirectory() as root:
            folder = pathlib.Path(root) / "run"
            folder.mkdir()
            board, begun = Board(), time.monotonic()
            arguments = folder, with_data, board, None, True
            Fork(pathlib.Path(root) / "log", train_watched, *arguments).finish()
            seconds = time.monotonic() - begun
            recorded = collections.defaultdict(list)
            for found in json.loads((folder / "recorded.json").read_text()):
                for name, content in found.items():
                    recorded[name].append(content)
            points = {phase: board.count(phase) for phase in PHASES}
            return cls(json.loads((folder / "final.json").read_text()), recorded, points, seconds)


@dataclasses.dataclass
class Trial:
    """What came of one training that was killed.

    Attributes:
        number: which one it is.
        aimed: whether the first kill was aimed at a point.
        phases: what ran when it was killed, kill by kill.
        corrupt: what was wrong with the files after the kills.
        differs: what the resumed training ended with that the other one did not.
        left: temporary files that are still there at the end.
    """

    number: int
    aimed: bool
    phases: list = dataclasses.field(default_factory=list)
    corrupt: list = dataclasses.field(default_factory=list)
    differs: str = ""
    left: list = dataclasses.field(default_factory=list)

    def kill(self, folder, log, with_data, reference, draw):
        """Run a training until it is killed, and look at its files."""
        aim, board, wait = None, Board(), draw.uniform(0, reference.seconds)
        if self.aimed and not self.phases:
            phase = AIMED[self.number // 2 % len(AIMED)]
            aim = Aim(phase, draw.randint(1, reference.points[phase]), draw.random() < 0.5)
            wait = 0.0 if aim.held else draw.uniform(0, AFTER_SECONDS)
        fork, begun = Fork(log, train_watched, folder, with_data, board, aim), time.monotonic()
        while fork.runs and aim is not None and not board.is_reached:
            begun = time.monotonic()
            time.sleep(0.001)
        while fork.runs and time.monotonic() - begun < wait:
            time.sleep(0.001)
        phase = board.phase
        if fork.kill():
            self.phases.append(phase)
            try:
                Fork(log, check, folder, reference).finish()
            except RuntimeError as error:
                self.corrupt.append(f"killed during {phase}: {error}")


def check(folder, reference):
    """Raise unless every file under a final name is whole, and one that the reference had too."""
    for name, content in fault_training.contents(folder).items():
        if content not in reference.recorded[name]:
            raise ValueError(f"{name} holds what no epoch of the reference had written")


def run_trial(number, references, seed):
    """Kill one training, once or twice, and let it go on to its end."""
    draw = random.Random(f"{seed}/{number}")
    trial = Trial(number, aimed=number % 2 == 0)
    with_data = number % 4 < 2
    reference = references[with_data]
    with tempfile.TemporaryDirectory() as root:
        folder, log = pathlib.Path(root) / "run", pathlib.Path(root) / "log"
        try:
            while not trial.phases:  # again where it had ended before it was killed
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                trial.kill(folder, log, with_data, reference, draw)
            if draw.random() < 0.25:
                trial.kill(folder, log, with_data, reference, draw)
            if not (folder / "final.json").exists():
                Fork(log, fault_training.train, folder, with_data).finish()
            final = json.loads((folder / "final.json").read_text())
            trial.differs = ", ".join(key for key in final if final[key] != reference.final[key])
        except RuntimeError as error:
            trial.differs = f"failed: {error}"
        trial.left = [path.name for path in folder.rglob("*") if path.name.endswith(ENDING)]
    return trial


def run_trials(count, seed=0, workers=1):
    """Yield the `Trial`s as they end. This process must not have computed anything yet."""
    context = multiprocessing.get_context("fork")
    references = {with_data: Reference.of(with_data) for with_data in (True, False)}
    one = functools.partial(run_trial, references=references, seed=seed)
    with context.Pool(workers) as pool:
        yield from pool.imap_unordered(one, range(count))


def main(count, seed=0):
    """Print the trials as JSON, one in a line."""
    for trial in run_trials(count, seed):
        print(json.dumps(dataclasses.asdict(trial)), flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
