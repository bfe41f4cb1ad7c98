"""The command line: `keras-compress plan | export | report | benchmark | demo`.

What a command needs is imported inside it.
"""

import importlib
import os
import pathlib
import sys
import zipfile
from typing import Annotated

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import typer
from rich.console import Console

LONGEST_MESSAGE = 600  # characters: Keras may quote a whole model in an error
ERRORS = (ValueError, TypeError, OSError, RuntimeError, ImportError, zipfile.BadZipFile)


class OneLineErrors(typer.core.TyperGroup):
    """Commands whose errors are one line on stderr and exit code 2, without a traceback."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort):  # of class RuntimeError
            raise
        except ERRORS as error:
            message = " ".join(str(error).split()) or type(error).__name__
            if len(message) > LONGEST_MESSAGE:
                message = message[:LONGEST_MESSAGE] + "..."
            typer.echo(f"keras-compress: {message}", err=True)
            raise typer.Exit(2) from error


app = typer.Typer(
    cls=OneLineErrors,
    help="Training-time compression for Keras 3, deployed to OpenVINO IR.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
ModelFile = Annotated[
    pathlib.Path, typer.Argument(metavar="MODEL", help="A `.keras` file.", show_default=False)
]

Imports = Annotated[
    list[str] | None,
    typer.Option(
        "--import",
        metavar="MODULE",
        help="Module to import first, for layer classes of your own: its code runs. Repeatable.",
        show_default=False,
    ),
]


@app.command()
def plan(
    model: ModelFile,
    config: Annotated[
        pathlib.Path,
        typer.Argument(metavar="CONFIG", help="A configuration: JSON, comments allowed."),
    ],
    pareto: Annotated[
        pathlib.Path | None,
        typer.Option(help="Figure to draw: size against predicted loss of the best widths."),
    ] = None,
    imports: Imports = None,
):
    """Say what a configuration would do with a model, without doing it.

    Example: `keras-compress plan float.keras config.json`
    """
    _must_exist(config, "a configuration file")
    loaded = _loaded(model, imports)
    import keras_compress as kc

    decided = kc.plan(loaded, config)
    _show(decided)
    if pareto is not None:
        kc.draw_pareto(decided, pareto)


@app.command()
def export(
    model: ModelFile,
    out: Annotated[
        pathlib.Path,
        typer.Argument(metavar="OUT", help="`name.xml`, `name.onnx` or a folder (SavedModel)."),
    ],
    verify: Annotated[
        bool, typer.Option(help="Whether to compare the result with the model on this CPU.")
    ] = True,
    imports: Imports = None,
):
    """Write a trained model for deployment, and compare it with the model.

    Example: `keras-compress export int8.keras int8.xml`
    """
    loaded = _loaded(model, imports)
    import keras_compress as kc

    with _working(f"exporting to {out}"):
        report = kc.export(loaded, out, verify=verify)
    if report is not None:
        _show(report)


@app.command()
def report(
    model: ModelFile,
    html: Annotated[
        pathlib.Path | None, typer.Option(help="Page to write: `report.html`.", show_default=False)
    ] = None,
    original: Annotated[
        pathlib.Path | None,
        typer.Option(help="The float model, a `.keras` file, to compare with.", show_default=False),
    ] = None,
    latency: Annotated[
        bool, typer.Option("--latency", help="Measure the exported models on this machine.")
    ] = False,
    imports: Imports = None,
):
    """Show parameters, FLOPs, bits and bytes of every layer, on request as a page.

    Example: `keras-compress report int8.keras --html report.html --original float.keras`
    """
    if html is not None:
        from keras_compress.report.page import checked_page_path

        checked_page_path(html)
    if original is not None:
        _must_exist(original, "a `.keras` file")
    loaded = _loaded(model, imports)
    reference = None if original is None else _loaded(original)
    import keras_compress as kc

    with _working("measuring latency" if latency else "counting"):
        found = kc.report(loaded, original=reference, latency=latency)
    _show(found)
    if html is not None:
        found.save(html)


@app.command()
def benchmark(
    ir: Annotated[
        list[pathlib.Path],
        typer.Argument(metavar="IR...", help="Exported models; the first is the reference."),
    ],
    batch_size: Annotated[int, typer.Option(min=1, help="Samples per call.")] = 1,
    calls: Annotated[int, typer.Option(min=1, help="Measured calls per model.")] = 100,
    warm_up: Annotated[int, typer.Option(min=0, help="Calls per model before that.")] = 10,
    threads: Annotated[int, typer.Option(min=0, help="Threads; 0: OpenVINO chooses.")] = 0,
):
    """Measure latency and throughput of exported models side by side, one call of each in turn.

    Example: `keras-compress benchmark float.xml int8.xml`
    """
    for path in ir:
        _must_exist(path, "an exported model (.xml, .onnx or a SavedModel folder)")
    from keras_compress.export.benchmark import benchmark as measure

    with _working(f"measuring {calls} calls of each of {len(ir)} models"):
        result = measure(ir, batch_size=batch_size, calls=calls, warm_up=warm_up, threads=threads)
    _show(result)


@app.command()
def demo(
    out: Annotated[pathlib.Path, typer.Option(help="Folder for the results.")] = pathlib.Path(
        "demo"
    ),
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of training in float.")] = 8,
    fine_tuning: Annotated[int, typer.Option(min=1, help="Epochs of training in int8.")] = 3,
):
    """Train, compress, export and compare a small network on scikit-learn's digits.

    Example: `keras-compress demo --out demo`
    """
    from keras_compress.demo import run_demo

    problems = run_demo(out, epochs, fine_tuning)
    for problem in problems:
        typer.echo(f"keras-compress: {problem}", err=True)
    if problems:
        raise typer.Exit(1)


def _must_exist(path, what):
    if not path.exists():
        raise FileNotFoundError(f"Expected {what}. Received: '{path}', which does not exist.")


def _import(names):
    """Import modules of the user's, from the working directory too: they register classes."""
    for name in names or ():
        if name.endswith(".py") or not all(part.isidentifier() for part in name.split(".")):
            raise ValueError(
                "Expected the name of a module, such as `my_layers` for `my_layers.py`. Received: "
                f"--import {name}"
            )
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        try:
            importlib.import_module(name)
        except Exception as error:  # whatever the module does
            raise ImportError(
                "Expected a module that can be imported, from the working directory or an "
                f"installed package. Received: --import {name}, {type(error).__name__}: {error}"
            ) from error


def _loaded(path, imports=None):
    """Load a Keras model in safe mode and without its training configuration."""
    _must_exist(path, "a `.keras` file")
    with _working(f"loading {path}"):
        import keras

        import keras_compress  # noqa: F401 - registers the compressed layers

        _import(imports)
        return keras.models.load_model(path, compile=False, safe_mode=True)


def _working(what):
    return Console(stderr=True).status(what)


def _show(result):
    """Print a result: for the terminal's width, or as wide as it is where a program reads it."""
    console = Console()
    if console.is_terminal:
        console.print(result)
    else:
        typer.echo(str(result))


def main():
    """Run the command line."""
    app(prog_name="keras-compress")


if __name__ == "__main__":
    main()
