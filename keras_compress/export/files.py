"""Output files appear whole or not at all: written beside their place, then renamed."""

import contextlib
import os
import pathlib
import shutil
import tempfile
import zlib

SUFFIXES = {".xml": "OpenVINO IR", ".onnx": "ONNX", "": "SavedModel directory"}


def checked_target(path):
    """Return `path` as a `pathlib.Path` that can be written, before any work is done.

    Raises:
        ValueError: unknown suffix.
        OSError: the folder is missing or not writable, or something else is in the way.
    """
    path = pathlib.Path(path)
    if path.suffix not in SUFFIXES or not path.name:
        known = ", ".join(f"'{suffix}' ({kind})" for suffix, kind in SUFFIXES.items())
        raise ValueError(
            f"The suffix of the path decides the format. Expected one of {known}. "
            f"Received: path={str(path)!r}"
        )
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"Expected an existing folder to export into. Received: path={str(path)!r}"
        )
    if path.exists() and path.is_dir() != (path.suffix == ""):
        kind = "folder" if path.is_dir() else "file"
        raise FileExistsError(f"A {kind} of that name is in the way. Received: path={str(path)!r}")
    with _temporary_folder(path):
        pass
    return path


def stored_files(path):
    """Return the files of an exported model: `.xml` and `.bin`, `.onnx`, or all in a directory."""
    path = pathlib.Path(path)
    if path.is_dir():
        return sorted(each for each in path.rglob("*") if each.is_file())
    names = (path.with_suffix(".bin"), path) if path.suffix == ".xml" else (path,)
    return [each for each in names if each.is_file()]


def zipped_size(files):
    """Return the bytes of files when each is deflated, as in a `.zip` (without its directory)."""
    total = 0
    for file in files:
        compressor = zlib.compressobj()
        with file.open("rb") as stream:
            while piece := stream.read(1 << 20):
                total += len(compressor.compress(piece))
        total += len(compressor.flush())
    return total


@contextlib.contextmanager
def replacing(path, *suffixes):
    """Give a temporary folder; what is made in it under the target's name takes the target's place.

    Args:
        path: the target.
        *suffixes: suffixes of the files that belong together, the one that is opened first by
            readers last, e.g. `".bin", ".xml"`. None: the target itself, file or directory.

    Yields:
        The path to write to, of the target's name.
    """
    with _temporary_folder(path) as folder:
        yield folder / path.name
        for suffix in suffixes or (path.suffix,):
            _put_in_place(folder / path.with_suffix(suffix).name, path.with_suffix(suffix))


@contextlib.contextmanager
def _temporary_folder(path):
    try:
        folder = tempfile.mkdtemp(prefix=f".{path.stem}-", dir=path.parent)
    except OSError as error:
        raise PermissionError(
            f"Expected a folder that can be written to. Received: path={str(path)!r} ({error})"
        ) from error
    try:
        yield pathlib.Path(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _put_in_place(new, target):
    """Rename; a directory that stands at the target steps aside first, and back on failure."""
    if not target.is_dir():
        os.replace(new, target)
        return
    aside = new.with_name(new.name + ".old")
    os.replace(target, aside)
    try:
        os.replace(new, target)
    except OSError:
        os.replace(aside, target)
        raise
