"""The notebook: it runs from first to last cell, and the last one shows what is promised."""

import pathlib
import re
import sys

import pytest
from backend_helpers import BACKEND

NOTEBOOK = pathlib.Path(__file__).resolve().parent.parent / "examples" / "quickstart.ipynb"


def executed(folder):
    """Return the notebook with its outputs, run by this interpreter in a folder."""
    import nbclient
    import nbformat
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpec

    class ThisInterpreter(AsyncKernelManager):
        """Whatever kernels are installed, this one is meant."""

        @property
        def kernel_spec(self):
            argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
            return KernelSpec(argv=argv, display_name="Python 3", language="python")

    client = nbclient.NotebookClient(
        nbformat.read(NOTEBOOK, as_version=4),
        kernel_manager_class=ThisInterpreter,
        resources={"metadata": {"path": str(folder)}},
        timeout=300,
    )
    return client.execute()


def table(cell):
    """Return the rows of a cell's table, {first column: the others}."""
    (output,) = (each for each in cell.outputs if "data" in each)
    lines = output["data"]["text/markdown"].splitlines()
    cells = [[entry.strip() for entry in line.strip("|").split("|")] for line in lines]
    return {first: others for first, *others in cells}


@pytest.mark.skipif(BACKEND != "tensorflow", reason="one run of the notebook shows what it shows")
def test_the_notebook_keeps_its_promises(tmp_path, monkeypatch):
    root = NOTEBOOK.parent.parent
    monkeypatch.setenv("PYTHONPATH", str(root), prepend=":")
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    notebook = executed(tmp_path)
    rows = table(notebook.cells[-1])
    assert rows[""] == ["float", "int8, pruned"]
    plain, small = (
        float(text.rstrip("%")) for text in rows["accuracy of the IR on the test images"]
    )
    assert plain >= 95
    assert small >= plain - 1.5
    plain, small = (int(text.replace(",", "")) for text in rows[".bin, bytes"])
    assert small == (tmp_path / "int8.bin").stat().st_size
    assert small < 0.2 * plain  # a quarter by 8 bits, and fewer filters
    names = {path.name for path in tmp_path.iterdir()}
    assert {"float.xml", "int8.xml", "int8.bin", "report.html"} <= names
    images = [
        o for c in notebook.cells for o in c.get("outputs", ()) if "image/png" in o.get("data", {})
    ]
    assert len(images) == 1


def test_the_notebook_is_stored_without_outputs():
    import nbformat

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code and not any(cell.outputs or cell.execution_count for cell in code)
    assert not re.search(r"/(home|work|tmp|Users)/", NOTEBOOK.read_text())
