"""Latency of exported models, measured side by side so that a busy machine is unfair to none."""

import dataclasses
import pathlib
import time

import numpy as np
from rich import box
from rich.table import Table

from keras_compress.export.verify import UNKNOWN_SIZE, compile_on_cpu
from keras_compress.rendering import Rendered


@dataclasses.dataclass(frozen=True)
class Latency:
    """Latency of one model in milliseconds per call.

    Attributes:
        path: the exported file.
        median: the middle of all calls.
        spread: distance between the quartiles: half of all calls lie within it.
        fastest: the shortest call, the least disturbed by other work.
        throughput: samples per second at the median.
    """

    path: str
    median: float
    spread: float
    fastest: float
    throughput: float


@dataclasses.dataclass(frozen=True)
class BenchmarkReport(Rendered):
    """Latencies of several models, the first being what the others are compared with.

    Attributes:
        latencies: tuple of `Latency`, in the order asked for.
        batch_size: samples per call.
        calls: measured calls per model.
        threads: threads per call; 0 where the runtime chose.
    """

    latencies: tuple
    batch_size: int
    calls: int
    threads: int

    def speedup(self, index):
        """How many times faster than the first model the one at `index` is, by the medians."""
        return self.latencies[0].median / self.latencies[index].median

    def to_dict(self):
        """Return the report as JSON-able data."""
        return dataclasses.asdict(self)

    def renderable(self):
        title = (
            f"batch {self.batch_size}, {self.calls} calls each, threads: {self.threads or 'auto'}"
        )
        columns = ("model", "median ms", "quartiles apart", "fastest", "samples/s", "speed-up")
        table = Table(*columns, title=title, title_justify="left", box=box.SIMPLE)
        for index, latency in enumerate(self.latencies):
            numbers = (latency.median, latency.spread, latency.fastest)
            table.add_row(
                latency.path,
                *(f"{number:.3f}" for number in numbers),
                f"{latency.throughput:.0f}",
                f"{self.speedup(index):.2f}x",
            )
        return table


def benchmark(paths, *, batch_size=1, calls=100, warm_up=10, threads=0, seed=0):
    """Measure exported models on this machine's CPU, one call of each in turn.

    Args:
        paths: exported files (`.xml`, `.onnx`, SavedModel directories); the first is the reference.
        batch_size: samples per call.
        calls: measured calls per model.
        warm_up: calls per model before measuring.
        threads: threads per call. 0: the runtime chooses.
        seed: of the random inputs.

    Returns:
        A `BenchmarkReport`.

    Raises:
        ValueError: no paths, or fewer than one call.
    """
    import openvino as ov

    paths = [pathlib.Path(path) for path in paths]
    if not paths or calls < 1:
        raise ValueError(
            f"Expected at least one path and one call. Received: paths={paths}, calls={calls}"
        )
    core = ov.Core()
    properties = {"PERFORMANCE_HINT": "LATENCY"}
    if threads:
        properties["INFERENCE_NUM_THREADS"] = threads
    models = [compile_on_cpu(core, path, **properties) for path in paths]
    runs = [prepared_request(model, batch_size, seed).infer for model in models]
    times = np.empty((calls, len(paths)))
    for call in range(-warm_up, calls):
        for index, run in enumerate(runs):
            start = time.perf_counter()
            run()
            if call >= 0:
                times[call, index] = (time.perf_counter() - start) * 1e3
    latencies = tuple(_summary(p, times[:, i], batch_size) for i, p in enumerate(paths))
    return BenchmarkReport(latencies, batch_size, calls, threads)


def prepared_request(compiled, batch_size=1, seed=0):
    """Return an inference request of a compiled model whose inputs are random numbers."""
    random = np.random.default_rng(seed)
    request = compiled.create_infer_request()
    for index, port in enumerate(compiled.inputs):
        sizes = [d.get_length() if d.is_static else UNKNOWN_SIZE for d in port.get_partial_shape()]
        sizes[:1] = [batch_size]
        dtype = port.get_element_type().to_dtype()
        floating = np.issubdtype(dtype, np.floating)
        array = random.standard_normal(sizes) if floating else np.zeros(sizes)
        request.get_input_tensor(index).shape = sizes
        request.get_input_tensor(index).data[:] = array.astype(dtype)
    return request


def _summary(path, times, batch_size):
    median = float(np.median(times))
    low, high = np.percentile(times, (25, 75))
    return Latency(
        path=str(path),
        median=median,
        spread=float(high - low),
        fastest=float(times.min()),
        throughput=batch_size * 1e3 / median,
    )
