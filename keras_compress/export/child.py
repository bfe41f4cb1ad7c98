"""Export from a JAX or torch session: the conversion runs in a child process under TensorFlow.

The command is `python -m keras_compress.export.child job.json`.
"""

import json
import os
import subprocess
import sys
import tempfile

import keras

from keras_compress.compress import strip


def export_in_child(model, path, input_names, output_names, metadata):
    """Write the export of `model` to `path` from a process whose Keras runs on TensorFlow.

    Args:
        model: compressed, stripped or plain Keras model, of any backend.
        path: where to write; its suffix decides the format.
        input_names, output_names: names of the tensors, in the model's order.
        metadata: JSON-able dict that goes into the file.

    Raises:
        RuntimeError: the child failed; the message is the whole of its standard error.
    """
    plain = strip(model)
    with tempfile.TemporaryDirectory() as folder:
        job = {
            "model": os.path.join(folder, "model.keras"),
            "path": str(path),
            "input_names": input_names,
            "output_names": output_names,
            "metadata": metadata,
            "modules": sorted({type(layer).__module__ for layer in plain.layers}),
            "search_path": sys.path,
        }
        plain.save(job["model"])
        job_file = os.path.join(folder, "job.json")
        with open(job_file, "w") as file:
            json.dump(job, file)
        result = subprocess.run(
            [sys.executable, "-c", COMMAND, job_file],
            env=os.environ | {"KERAS_BACKEND": "tensorflow", "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
        )
    if result.returncode:
        raise RuntimeError(
            f"The export of model '{model.name}' runs under TensorFlow in a process of its own, "
            f"which failed (exit code {result.returncode}):\n{result.stderr}"
        )


COMMAND = (
    "import json, sys\n"
    "job = json.load(open(sys.argv[1]))\n"
    "sys.path[:] = job['search_path']\n"
    "from keras_compress.export.child import run\n"
    "run(job)\n"
)
