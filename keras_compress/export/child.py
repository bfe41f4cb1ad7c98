"""Export from a JAX or torch session: the conversion runs in a child process under TensorFlow.

The two sides speak through a job file; what the child has to say about a failure reaches the user.
"""

import importlib
import json
import os
import subprocess
import sys
import tempfile
import types

import keras

from keras_compress.export.formats import write
from keras_compress.strip import strip

COMMAND = (
    "import json, sys; job = json.load(open(sys.argv[1])); sys.path[:] = job['search_path']; "
    "from keras_compress.export.child import run; run(job)"
)


def export_in_child(model, path, input_names, output_names, metadata):
    """Write the export of `model` to `path` from a process whose Keras runs on TensorFlow.

    Args:
        model: compressed, stripped or plain Keras model, of any backend.
        path: where to write; its suffix decides the format.
        input_names: names of the input tensors, in the model's order.
        output_names: the same of the output tensors.
        metadata: JSON-able dict that goes into the file.

    Raises:
        ValueError: a `Lambda` layer holds a function without a name, which no file can hold as
            data. `strip` takes apart those that it can trace.
        RuntimeError: the child failed; the message is the whole of its standard error.
    """
    plain = strip(model)
    _require_no_code(plain)
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


def _require_no_code(plain):
    """Raise where a file of the model would hold code: files are loaded in Keras' safe mode."""
    for layer in plain.layers:
        functions = (value for value in vars(layer).values() if isinstance(value, types.LambdaType))
        if any(function.__name__ == "<lambda>" for function in functions):
            raise ValueError(
                f"Layer '{layer.name}' ({type(layer).__name__}) holds a Python lambda, which a "
                "file could only keep as code. Expected a function with a name, registered with "
                "`keras.saving.register_keras_serializable()`, or an export from a session whose "
                f"Keras runs on TensorFlow. Received: model '{plain.name}'"
            )


def run(job):
    """Carry out a job in the child process."""
    for module in job["modules"]:  # registers the user's own layer classes
        if module != "__main__":
            importlib.import_module(module)
    model = keras.models.load_model(job["model"], compile=False, safe_mode=True)
    write(model, job["path"], job["input_names"], job["output_names"], job["metadata"])
