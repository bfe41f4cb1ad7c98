"""How long each Keras layer of an exported model takes, by OpenVINO's own profile."""

import numpy as np

from keras_compress.export.benchmark import prepared_request
from keras_compress.export.verify import compile_on_cpu


def layer_times(path, graph, calls=30, of_calls=np.median):
    """Return {name of a Keras layer: milliseconds per call} of an exported model, "" for the rest.

    Args:
        path: the `.xml` file.
        graph: the `Graph` that it was made from.
        calls: how many are profiled.
        of_calls: function that makes one number of an operation's times. The shortest, `np.min`, is
            the least disturbed by other work.
    """
    import openvino as ov

    compiled = compile_on_cpu(ov.Core(), path, PERF_COUNT="YES", PERFORMANCE_HINT="LATENCY")
    owners = _owners(compiled, set(graph.layer_nodes()))
    request = prepared_request(compiled)
    samples = {}
    for _ in range(calls):
        request.infer()
        for info in request.get_profiling_info():
            milliseconds = info.real_time.total_seconds() * 1e3
            samples.setdefault(info.node_name, []).append(milliseconds)
    times = {}
    for name, values in samples.items():
        owner = owners.get(name, "")
        times[owner] = times.get(owner, 0.0) + float(of_calls(values))
    return times


def _owners(compiled, layers):
    """Return {name of an executed operation: name of the Keras layer that it computes}."""
    owners = {}
    for op in compiled.get_runtime_model().get_ordered_ops():
        info = op.get_rt_info()
        key = "originalLayersNames"
        originals = str(info[key].value).split(",") if key in info else []
        names = [name.split("/")[0] for name in (*originals, op.get_friendly_name())]
        owners[op.get_friendly_name()] = next((name for name in names if name in layers), "")
    return owners
