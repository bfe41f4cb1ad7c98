"""The shape of the code: one-way imports, private names in few places, documented parts."""

import ast
import importlib
import inspect
import pathlib
import re

import pytest
from backend_helpers import BACKEND

import keras_compress

ROOT = pathlib.Path(keras_compress.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
every_file = pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))

# Where a private attribute of Keras may be read.
PRIVATE_HERE = (
    "graph/trace.py",
    "graph/symbolic.py",
    "graph/walk.py",
    "layers.py",
    "compressed_layer.py",
)
PRIVATE_NAMES = r"""
    keras\.src|\._keras_history|_inbound_nodes|_outbound_nodes|_nodes_by_depth|_flatten_layers
    |_inputs_struct|_outputs_struct|_functional\b|_build_shapes_dict|_call_context_args
    |_call_has_|_seed_generators|\._trainable_variables|\._non_trainable_variables
    |_keras_mask|_set_mask_metadata|_compute_causal_mask|_exclude_from_weight_decay\b(?!\()|\._layers\b|\._tracker\b|\._losses\b
"""
# Lower may not import higher. A package counts with everything inside it.
LEVELS = [
    {"schedules", "sparsity_schedules", "importance", "sparsity", "bit_search", "metrics"}
    | {"options", "scopes", "ranges", "rendering", "replicas", "whole_files"},
    {"records"},
    {"transforms", "fake_quantize", "quantizers", "binary_quantizers", "masks", "weight_masks"}
    | {"layer_specs", "accuracy_aware"},
    {"layers", "prunable_layers", "compressed_layer"},
    {"graph", "plan"},
    {"algorithms"},
    {"config", "data"},
    {"model_facts"},
    {"strip"},
    {"compressed_model", "teacher", "training.batch_norm", "training.legr", "training.compiled"},
    {"export", "report", "shrink", "plots"},
    {"training"},
    {"compress"},
    {"sensitivity"},
    {"stepping"},
    {"statistics"},
    {"callbacks"},
    {"accuracy_aware_fit"},
    {"cli", "torch", "demo"},
]


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def level_of(module):
    """Return the level of a module of the package: the most specific entry counts."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        name = ".".join(parts[:length])
        for level, names in enumerate(LEVELS):
            if name in names:
                return level
    raise AssertionError(f"module {module} has no level: give it one in this test")


def imports_of(path):
    """Return the package's modules that a file imports, at the top of the file or inside."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("keras_compress"):
            base = node.module.partition(".")[2]
            for alias in node.names:
                inner = f"{base}.{alias.name}".strip(".")
                is_module = (ROOT / (inner.replace(".", "/") + ".py")).exists()
                is_package = (ROOT / inner.replace(".", "/")).is_dir()
                found.add(inner if is_module or is_package else base)
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            found |= {n.partition(".")[2] for n in names if n.startswith("keras_compress.")}
    return found - {""}


@every_file
def test_imports_run_one_way(path):
    module = module_of(path)
    if not module:
        pytest.skip("the package itself imports every public name")
    above = {name for name in imports_of(path) if level_of(name) > level_of(module)}
    # A callback that exports reaches for the exporters when it runs, on the same level.
    assert not above


def test_no_ring_of_imports():
    graph = {module_of(path): imports_of(path) for path in FILES if module_of(path)}

    def reached(module, seen):
        for name in graph.get(module, ()):
            if name not in seen:
                seen.add(name)
                reached(name, seen)
        return seen

    assert not [module for module in graph if module in reached(module, set())]


@every_file
def test_private_keras_names_stay_in_their_places(path):
    if str(path.relative_to(ROOT)) in PRIVATE_HERE:
        pytest.skip("this file reads Keras' private attributes for all others")
    found = re.findall(PRIVATE_NAMES, path.read_text(), re.VERBOSE)
    assert not found


@every_file
def test_files_stay_small(path):
    assert len(path.read_text().splitlines()) <= 500


@every_file
def test_functions_stay_small_and_nothing_is_asserted(path):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno < 60, node.name
        assert not isinstance(node, ast.Assert)
        assert not (isinstance(node, ast.ExceptHandler) and node.type is None)


def public_names():
    for path in FILES:
        if path.parent.name == "torch" and BACKEND != "torch":
            continue  # refuses to be imported then
        module = importlib.import_module(".".join(["keras_compress", module_of(path)]).strip("."))
        for name, value in vars(module).items():
            own = getattr(value, "__module__", None) == module.__name__
            if not name.startswith("_") and own and (inspect.isclass(value) or callable(value)):
                yield f"{module.__name__}.{name}", value


@pytest.mark.parametrize("value", [pytest.param(v, id=n) for n, v in public_names()])
def test_public_names_are_documented(value):
    assert (value.__doc__ or "").strip()


def test_every_module_says_what_it_is():
    for path in FILES:
        assert ast.get_docstring(ast.parse(path.read_text())), path
