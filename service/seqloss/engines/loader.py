"""Picks and loads the engine of a bundle; imports engines only when one is needed."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from seqloss.bundle.manifest import EngineName, Graph, Precision
from seqloss.bundle.reader import Bundle
from seqloss.engines.base import Engine
from seqloss.engines.self_test import require_self_test
from seqloss.engines.upgrading import UpgradingEngine
from seqloss.errors import ConfigurationError, KernelsUnavailableError, SelfTestError
from seqloss.kernels.build import AVX2, AVX512_BF16, built, instructions, is_built
from seqloss.settings import USER_CACHE

if TYPE_CHECKING:
    from seqloss.kernels.functions import KernelLibrary

_LOG = logging.getLogger(__name__)

# The library that each engine stands on.
_LIBRARIES: dict[EngineName, str] = {"torch": "torch", "onnx": "onnxruntime"}


@dataclass(frozen=True, slots=True)
class KernelOptions:
    """What to do about kernels that are compiled for a CPU; see `seqloss.kernels`.

    Attributes:
        cache: where they are kept; None for none.
        wait: whether to compile them first; else Torch's own operators compute meanwhile.
        required: whether nothing else may compute.
    """

    cache: Path | None = USER_CACHE
    wait: bool = True
    required: bool = False


_KERNELS = KernelOptions()
# What a CPU needs for the kernels of a precision.
_KERNELS_OF: dict[Precision, frozenset[str]] = {"float32": AVX2, "bfloat16": AVX512_BF16}


def load_engine(
    bundle: Bundle,
    device: str = "auto",
    precision: Precision | Literal["auto"] = "auto",
    threads: int | None = None,
    name: EngineName | Literal["auto"] = "auto",
    kernels: KernelOptions = _KERNELS,
) -> Engine:
    """Loads a bundle onto a device and has it pass the bundle's self-test.

    Args:
        bundle: an opened bundle.
        device: `auto`, `cpu` or `cuda:N`.
        precision: of the graph to run; `auto` for the fastest on the device that the bundle has.
        threads: CPU threads for matrix products; None leaves the engine's choice.
        name: of the engine; `auto` for the first that the bundle has graphs for and that is
            installed.
        kernels: whether, and when, to have them.

    Raises:
        BundleError: graphs and weights do not belong together.
        ConfigurationError: no such device, the engine's library is not installed, the bundle has
            no graph of the engine or the precision, or kernels that are required are not there.
        SelfTestError: the device computes other numbers than the bundle states.
    """
    chosen = _engine_of(bundle, name)
    wanted = _precisions_by_speed(chosen, device) if precision == "auto" else (precision,)
    graph = _graph_of(bundle, chosen, wanted)

    def tested(kernels: KernelOptions) -> Engine:
        engine = open_engine(bundle, graph, device, threads, kernels)
        try:
            require_self_test(engine, bundle.manifest, graph)
        except SelfTestError as error:
            has_kernels = engine.info.has_kernels
            engine.close()
            if kernels.required or not has_kernels:
                raise
            why = str(error)
        else:
            return engine
        # Here, where nothing holds the weights of the first one any more. It may be the bundle.
        plain = tested(replace(kernels, cache=None))
        _LOG.error("the kernels do not compute what they should, and are not used: %s", why)
        return plain

    were_there = kernels.cache is not None and is_built(kernels.cache)
    try:
        engine = tested(kernels)
    except KernelsUnavailableError as error:
        raise _not_deterministic(bundle, f": {error}") from error
    if kernels.required and not engine.info.is_batch_invariant:
        engine.close()
        raise _not_deterministic(bundle)
    info = engine.info
    may_have_them = (info.engine, info.device) == ("torch", "cpu") and info.precision in _KERNELS_OF
    if were_there or info.has_kernels or kernels.wait or kernels.cache is None or not may_have_them:
        return engine
    return UpgradingEngine(engine, lambda: tested(replace(kernels, wait=True, required=True)))


def _not_deterministic(bundle: Bundle, why: str = "") -> ConfigurationError:
    return ConfigurationError(
        f"{bundle.folder} cannot be served deterministically here: that takes a Torch graph of a "
        "family that has a native model, in float32 or bfloat16, in sizes that kernels have, a CPU "
        "with AVX2 (for bfloat16 with AVX512_BF16), and g++; and --precision float32 on a CPU with "
        f"AMX, whose bfloat16 products are oneDNN's{why}"
    )


def open_engine(
    bundle: Bundle,
    graph: Graph,
    device: str = "auto",
    threads: int | None = None,
    kernels: KernelOptions = _KERNELS,
) -> Engine:
    """Loads one graph of a bundle, and asks nothing of it; for arguments see `load_engine`."""
    if graph.engine == "onnx":
        from seqloss.engines.onnx_engine import OnnxEngine  # noqa: PLC0415

        return OnnxEngine(bundle, graph, device, threads)
    import torch  # noqa: PLC0415 - most of the service runs without it

    from seqloss.engines.torch_engine import TorchEngine, device_named  # noqa: PLC0415

    if threads is not None:
        torch.set_num_threads(threads)
    library = _library(kernels, graph.precision) if device_named(device).type == "cpu" else None
    return TorchEngine(bundle, graph, device, library)


def _library(kernels: KernelOptions, precision: Precision) -> KernelLibrary | None:
    """None where there are no kernels for the precision, or not yet.

    Raises:
        KernelsUnavailableError: they are required.
    """
    from seqloss.kernels.functions import KernelLibrary  # noqa: PLC0415 - imports torch

    if kernels.cache is None or not (kernels.wait or is_built(kernels.cache)):
        return None
    try:
        if missing := _KERNELS_OF.get(precision, frozenset()) - instructions():
            raise KernelsUnavailableError(
                f"those for {precision} are for Linux, on a CPU with {', '.join(sorted(missing))}"
            )
        return KernelLibrary(built(kernels.cache))
    except KernelsUnavailableError as error:
        if kernels.required:
            raise
        _LOG.warning("there are no kernels, and Torch's own operators compute: %s", error)
        return None


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
