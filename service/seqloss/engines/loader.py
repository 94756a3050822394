"""Picks and loads the engine of a bundle; imports engines only when one is needed."""

from __future__ import annotations

from typing import Literal

from seqloss.bundle.manifest import Graph, Precision
from seqloss.bundle.reader import Bundle
from seqloss.engines.base import Engine
from seqloss.engines.self_test import require_self_test
from seqloss.errors import ConfigurationError


def load_engine(
    bundle: Bundle,
    device: str = "auto",
    precision: Precision | Literal["auto"] = "auto",
    torch_threads: int | None = None,
) -> Engine:
    """Loads a bundle onto a device and has it pass the bundle's self-test.

    Args:
        bundle: an opened bundle.
        device: `auto`, `cpu` or `cuda:N`.
        precision: of the graph to run; `auto` for the fastest on the device that the bundle has.
        torch_threads: CPU threads for matrix products; None leaves Torch's choice.

    Raises:
        BundleError: graphs and weights do not belong together.
        ConfigurationError: no such device, the engine's library is not installed, or the bundle
            has no graph of the precision.
        SelfTestError: the device computes other numbers than the bundle states.
    """
    try:
        import torch  # noqa: PLC0415 - most of the service runs without it

        from seqloss.engines.torch_engine import (  # noqa: PLC0415
            TorchEngine,
            device_named,
            precisions_by_speed,
        )
    except ImportError as error:
        raise ConfigurationError(
            f"this bundle needs the Torch engine, and {error.name} is not installed: "
            "pip install 'seqloss[torch]'"
        ) from error
    if torch_threads is not None:
        torch.set_num_threads(torch_threads)
    wanted = precisions_by_speed(device_named(device)) if precision == "auto" else (precision,)
    graph = _graph_of(bundle, wanted)
    engine = TorchEngine(bundle, graph, device)
    require_self_test(engine, bundle.manifest, graph)
    return engine


def _graph_of(bundle: Bundle, wanted: tuple[Precision, ...]) -> Graph:
    """The first of the wanted precisions that the bundle has."""
    graphs = {graph.precision: graph for graph in bundle.manifest.graphs}
    found = next((precision for precision in wanted if precision in graphs), None)
    if found is None:
        raise ConfigurationError(
            f"{bundle.folder} holds {', '.join(graphs)}, and not {' or '.join(wanted)}; ask for "
            f"what it holds, or export it again with --precision {' '.join([*graphs, wanted[0]])}"
        )
    return graphs[found]
