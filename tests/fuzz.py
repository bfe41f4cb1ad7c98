"""Fuzzing in the long run: counts of what was accepted, refused, or crashed.

    python tests/fuzz.py configurations --count 10000
    python tests/fuzz.py models --count 300

Ends with exit code 1 where anything crashed, and shows the seeds of that: each gives its case again
with `--first SEED --count 1`.
"""

import collections
import contextlib
import logging
import os
import pathlib
import random
import tempfile
import time
from typing import Annotated

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import awkward_models  # noqa: F401  (adds its models to the collection)
import fuzz_config
import fuzz_models
import keras
import masked_models  # noqa: F401
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
First = Annotated[int, typer.Option(help="Seed of the first case.")]
GOOD = ("accepted", "done", "refused")


@app.command()
def configurations(
    count: Annotated[int, typer.Option(help="Configurations.")] = 10_000,
    first: First = 0,
    compress_every: Annotated[int, typer.Option(help="Every how many are compressed with.")] = 20,
):
    """Change valid configurations at random; each is accepted, or refused by one clear error."""
    model = fuzz_config.tiny_model()

    def one(seed, folder):
        case = fuzz_config.Case(random.Random(seed))
        verdict, remark = fuzz_config.judge(case, model, folder, seed % compress_every == 0)
        return verdict, f"{', '.join(case.changes)}: {remark}", ()

    run(one, range(first, first + count), ("accepted", "refused", "unnamed", "crashed"))


@app.command()
def models(
    count: Annotated[int, typer.Option(help="Models.")] = 300,
    first: First = 0,
    export_every: Annotated[int, typer.Option(help="Every how many are exported.")] = 4,
):
    """Take random models with random configurations all the way to IR."""

    def one(seed, folder):
        trial = fuzz_models.Trial(seed)
        export = keras.backend.backend() == "tensorflow" and seed % export_every == 0
        outcome = fuzz_models.go(trial, folder, export=export)
        names = ", ".join(entry["algorithm"] for entry in trial.config["compression"])
        remark = f"{outcome.stage}: {trial.what}, {names}: {outcome.remark}"
        events = [f"{outcome.verdict} in: {outcome.stage}"]
        events += [f"a value between two levels in: {stage}" for stage in outcome.flips]
        return outcome.verdict, remark, events

    run(one, range(first, first + count), ("done", "refused", "crashed"))


def run(one, seeds, verdicts):
    """Judge every seed, and print the counts; Ctrl-C prints those so far."""
    logging.getLogger("keras_compress").setLevel(logging.ERROR)
    console, counts, started = Console(), collections.Counter(), time.perf_counter()
    done = 0
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(KeyboardInterrupt):
        os.chdir(folder)  # configurations name files
        for seed in track(seeds, "fuzzing", console=Console(stderr=True)):
            verdict, remark, events = one(seed, pathlib.Path(folder))
            counts.update([verdict, *events])
            done += 1
            if verdict not in GOOD:
                text = f"seed {seed}: {verdict}: {remark}"[:1000]
                console.print(ascii(text), markup=False, highlight=False)
    os.chdir(pathlib.Path(__file__).parent)
    table = Table("what", "cases")
    for name in (*verdicts, *sorted(counts.keys() - set(verdicts))):
        table.add_row(name, f"{counts[name]:,}")
    console.print(table)
    seconds = time.perf_counter() - started
    console.print(f"{done:,} seeds from {seeds.start} in {seconds:.0f} s")
    if any(counts[name] for name in set(verdicts) - set(GOOD)):
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
