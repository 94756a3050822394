"""Picks and loads the engine of a bundle; imports engines only when one is needed."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal

from seqloss.bundle.manifest import EngineName, Graph, Precision
from seqloss.bundle.reader import Bundle
from seqloss.engines.base import Engine
from seqloss.engines.self_test import require_self_test
from seqloss.errors import ConfigurationError

# The library that each engine stands on.
_LIBRARIES: dict[EngineName, str] = {"torch": "torch", "onnx": "onnxruntime"}


def load_engine(
    bundle: Bundle,
    device: str = "auto",
    precision: Precision | Literal["auto"] = "auto",
    threads: int | None = None,
    name: EngineName | Literal["auto"] = "auto",
) -> Engine:
    """Loads a bundle onto a device and has it pass the bundle's self-test.

    Args:
        bundle: an opened bundle.
        device: `auto`, `cpu` or `cuda:N`.
        precision: of the graph to run; `auto` for the fastest on the device that the bundle has.
        threads: CPU threads for matrix products; None leaves the engine's choice.
        name: of the engine; `auto` for the first that the bundle has graphs for and that is
            installed.

    Raises:
        BundleError: graphs and weights do not belong together.
        ConfigurationError: no such device, the engine's library is not installed, or the bundle
            has no graph of the engine or the precision.
        SelfTestError: the device computes other numbers than the bundle states.
    """
    chosen = _engine_of(bundle, name)
    wanted = _precisions_by_speed(chosen, device) if precision == "auto" else (precision,)
    graph = _graph_of(bundle, chosen, wanted)
    engine = open_engine(bundle, graph, device, threads)
    require_self_test(engine, bundle.manifest, graph)
    return engine


def open_engine(
    bundle: Bundle, graph: Graph, device: str = "auto", threads: int | None = None
) -> Engine:
    """Loads one graph of a bundle, and asks nothing of it; for arguments see `load_engine`."""
    if graph.engine == "onnx":
        from seqloss.engines.onnx_engine import OnnxEngine  # noqa: PLC0415

        return OnnxEngine(bundle, graph, device, threads)
    import torch  # noqa: PLC0415 - most of the service runs without it

    from seqloss.engines.torch_engine import TorchEngine  # noqa: PLC0415

    if threads is not None:
        torch.set_num_threads(threads)
    return TorchEngine(bundle, graph, device)


def _engine_of(bundle: Bundle, name: EngineName | Literal["auto"]) -> EngineName:
    """The engine that is asked for, or the first of the bundle's that is installed."""
    held = list(dict.fromkeys(graph.engine for graph in bundle.manifest.graphs))
    if name != "auto" and name not in held:
        raise ConfigurationError(
            f"{bundle.folder} holds graphs for {' and '.join(held)}, and none for {name}; export "
            f"it again with --engine {name}"
        )
    wanted = held if name == "auto" else [name]
    installed = [engine for engine in wanted if find_spec(_LIBRARIES[engine])]
    if not installed:
        libraries = " or ".join(_LIBRARIES[engine] for engine in wanted)
        extras = " or ".join(f"pip install 'seqloss[{engine}]'" for engine in wanted)
        raise ConfigurationError(f"{bundle.folder} needs {libraries}, not installed here: {extras}")
    return installed[0]


def _precisions_by_speed(engine: EngineName, device: str) -> tuple[Precision, ...]:
    if engine == "onnx":
        from seqloss.engines import onnx_engine  # noqa: PLC0415

        return onnx_engine.precisions_by_speed(device)
    from seqloss.engines import torch_engine  # noqa: PLC0415

    return torch_engine.precisions_by_speed(torch_engine.device_named(device))


def _graph_of(bundle: Bundle, engine: EngineName, wanted: tuple[Precision, ...]) -> Graph:
    """The first of the wanted precisions that the bundle has."""
    graphs = {graph.precision: graph for graph in bundle.manifest.graphs if graph.engine == engine}
    found = next((precision for precision in wanted if precision in graphs), None)
    if found is None:
        raise ConfigurationError(
            f"{bundle.folder} holds {', '.join(graphs)} for {engine}, and not "
            f"{' or '.join(wanted)}; ask for what it holds, or export it again with --engine "
            f"{engine} --precision {' '.join([*graphs, wanted[0]])}"
        )
    return graphs[found]
