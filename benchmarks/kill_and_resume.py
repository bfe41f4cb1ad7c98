"""Trainings that are killed at random points, go on, and are compared with one that was not.

    python benchmarks/kill_and_resume.py [--trials 200] [--seed 0] [--workers 1]

Each training is a process of its own: 8 bits, pruning with a schedule and sparsity that moves every
step, with `Backup`, `ModelCheckpoint`, `ExportIR`, a SavedModel and a report of its check. Odd
trials are killed at a moment drawn uniformly from the run; even ones before or shortly after one of
the calls that set a mask or write a file. One in four is killed twice. After every kill, all files
under their final names are loaded and run, and each must hold what some epoch of the reference
wrote. `tests/fault_trials.py` does the work.
"""

import collections
import os
import pathlib
import sys

os.environ.update(
    KERAS_BACKEND="tensorflow",
    TF_CPP_MIN_LOG_LEVEL="3",
    OMP_NUM_THREADS="1",
    CUDA_VISIBLE_DEVICES="",
)
sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "tests"))

import fault_trials  # noqa: E402
import typer  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import track  # noqa: E402
from rich.table import Table  # noqa: E402


def main(trials: int = 200, seed: int = 0, workers: int = 1):
    """Print how many trainings were the same in the end, and how many files were corrupt."""
    console = Console()
    running = fault_trials.run_trials(trials, seed, workers)
    done = list(track(running, "trials", total=trials, console=Console(stderr=True)))
    for trial in done:
        if trial.differs or trial.corrupt or trial.left:
            console.print(trial)
    kills = collections.Counter(phase for trial in done for phase in trial.phases)
    table = Table("", "")
    table.add_row("trials", str(len(done)))
    table.add_row("kills", str(kills.total()))
    for phase in fault_trials.PHASES:
        table.add_row(f"  during {phase}", str(kills[phase]))
    table.add_row("resumed bitwise", str(sum(not trial.differs for trial in done)))
    table.add_row("corrupt files", str(sum(len(trial.corrupt) for trial in done)))
    table.add_row("temporary files left", str(sum(len(trial.left) for trial in done)))
    console.print(table)
    if any(trial.differs or trial.corrupt or trial.left for trial in done):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
