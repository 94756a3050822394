"""Picks and loads the engine of a bundle; imports engines only when one is needed."""

from __future__ import annotations

from seqloss.bundle.manifest import Graph
from seqloss.bundle.reader import Bundle
from seqloss.engines.base import Engine
from seqloss.engines.self_test import require_self_test
from seqloss.errors import ConfigurationError


def graph_of(bundle: Bundle) -> Graph:
    """The graph to serve."""
    return bundle.manifest.graphs[0]


def load_engine(bundle: Bundle, device: str = "auto", torch_threads: int | None = None) -> Engine:
    """Loads a bundle onto a device and has it pass the bundle's self-test.

    Args:
        bundle: an opened bundle.
        device: `auto`, `cpu` or `cuda:N`.
        torch_threads: CPU threads for matrix products; None leaves Torch's choice.

    Raises:
        BundleError: graphs and weights do not belong together.
        ConfigurationError: no such device, or the engine's library is not installed.
        SelfTestError: the device computes other numbers than the bundle states.
    """
    try:
        import torch  # noqa: PLC0415 - most of the service runs without it

        from seqloss.engines.torch_engine import TorchEngine  # noqa: PLC0415
    except ImportError as error:
        raise ConfigurationError(
            f"this bundle needs the Torch engine, and {error.name} is not installed: "
            "pip install 'seqloss[torch]'"
        ) from error
    if torch_threads is not None:
        torch.set_num_threads(torch_threads)
    graph = graph_of(bundle)
    engine = TorchEngine(bundle, graph, device)
    require_self_test(engine, bundle.manifest, graph)
    return engine
