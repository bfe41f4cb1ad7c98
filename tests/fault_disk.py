"""Writes everything that can be written onto a disk that is too small; prints what came of it.

python fault_disk.py FOLDER BYTES

The folder is a small file system where this process may mount one, else files may not be larger
than a number of bytes.
"""

import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys

import keras
import numpy as np

import keras_compress as kc


def main(folder, size):
    folder = pathlib.Path(folder)
    options = ["-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    mounted = subprocess.run(["mount", *options], capture_output=True).returncode == 0
    try:
        if not mounted:
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        print(json.dumps(write_all(folder, size) | {"mounted": mounted}), flush=True)
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)
    os._exit(0)  # HDF5 cannot close what it could not write, and takes the process down with it


def write_all(folder, size):
    x = np.random.default_rng(0).normal(size=(16, 64)).astype("float32")
    inputs = keras.Input((64,), name="point")
    outputs = keras.layers.Dense(4)(keras.layers.Dense(2000, activation="relu")(inputs))
    config = {"compression": {"algorithm": "quantization"}}
    model = kc.compress_model(keras.Model(inputs, outputs), config, x, verbose=False)
    report = kc.report(model)  # is smaller than the disk, and so comes last, beside a large file
    writers = {
        "model.xml": lambda path: kc.export(model, path, verify=False),
        "model.onnx": lambda path: kc.export(model, path, verify=False),
        "model": lambda path: kc.export(model, path, verify=False),
        "model.keras": model.save,
        "model.weights.h5": model.save_weights,
        "model.html": report.save,
    }
    found = {}
    for name, write in writers.items():
        old = folder / name
        make(old)
        if name == "model.html":
            leave_room_for(folder, 4096, size)
        try:
            write(old)
            found[name] = ["written", ""]
        except OSError as error:
            found[name] = [type(error).__name__, str(error)]
        except Exception as error:
            found[name] = [f"not an OSError but {type(error).__name__}", str(error)]
        found[name].append(sorted(path.name for path in folder.rglob("*")))
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    return found


def make(path):
    """Put something in the target's place: a file, or a folder that holds one."""
    if not path.suffix:
        path.mkdir()
        path = path / "old"
    path.write_text("old")


def leave_room_for(folder, room, size):
    """Fill the disk up to some bytes, or let files be that large at most."""
    if folder.is_mount():
        (folder / ".filler").write_bytes(b"0" * (size - 4 * room))
    else:
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
