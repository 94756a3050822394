"""Runs an exported loss graph in ONNX Runtime, on a CPU or an NVIDIA GPU. Needs no Torch."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnxruntime

from seqloss.bundle.manifest import Graph, Precision
from seqloss.bundle.reader import Bundle
from seqloss.engines.base import EngineInfo
from seqloss.engines.layout import padded
from seqloss.engines.onnx_options import SHARED_INT8, session_options
from seqloss.engines.onnx_signature import LOSS_INPUTS, LOSS_OUTPUTS
from seqloss.errors import BundleError, ConfigurationError, EngineDeadError, OutOfMemoryError
from seqloss.records import Batch, TokenTerms

_CUDA = "CUDAExecutionProvider"
# On a CPU this one puts a slow kernel in the place of two fast ones: 1.4 s became 1.7 s of int8.
_SLOW_FUSIONS = ["SkipLayerNormFusion"]
_WARNING = 2
# Bundles of earlier versions have such constants.
_SHARED_INT8_HINT = (
    "; int8 constants of it have several uses, for which ONNX Runtime has no products on CPUs "
    "without VNNI: export or import it again with this version of seqloss"
)


class OnnxEngine:
    """One bundle's model on one device; see `seqloss.engines.base.Engine`."""

    def __init__(
        self, bundle: Bundle, graph: Graph, device: str, threads: int | None = None
    ) -> None:
        """Loads a graph.

        Args:
            bundle: an opened bundle.
            graph: one of its ONNX graphs.
            device: `auto`, `cpu` or `cuda:N`.
            threads: for matrix products on a CPU; None leaves ONNX Runtime's choice.

        Raises:
            BundleError: ONNX Runtime does not take the graph.
            ConfigurationError: there is no such device, or no library for it.
        """
        self._device = device_named(device)
        _refuse_precision(graph.precision, self._device)
        self._source_multiple = graph.source_multiple
        self._session = _session(bundle, graph, self._device, threads)
        self._info = EngineInfo(
            "onnx",
            self._device,
            graph.precision,
            onnxruntime.__version__,
            graph.source_multiple,
            graph.makes_logits,
        )

    @property
    def info(self) -> EngineInfo:
        """What runs the model, where, in which precision."""
        return self._info

    def score(self, batch: Batch) -> TokenTerms:
        """See `Engine.score`."""
        inputs = padded(batch, self._source_multiple)
        num_full = len(inputs.labels) if batch.with_ranks_and_entropies else 0
        values = (*inputs, np.arange(num_full))
        with _device_errors():
            binding = self._session.io_binding()
            for name, value in zip(LOSS_INPUTS, values, strict=True):
                binding.bind_cpu_input(name, value)
            for name in LOSS_OUTPUTS:
                binding.bind_output(name)
            self._session.run_with_iobinding(binding)
            terms = binding.copy_outputs_to_cpu()
        return TokenTerms(*(terms if batch.with_ranks_and_entropies else terms[:2]))

    def release_memory(self) -> None:
        """See `Engine.release_memory`; the arena keeps what it has, and has what batches need."""

    def memory_bytes(self) -> Mapping[str, int]:
        """See `Engine.memory_bytes`; ONNX Runtime does not tell, and this is empty."""
        return {}

    def close(self) -> None:
        """Frees the device's memory."""
        del self._session


def device_named(name: str) -> str:
    """`cpu` or `cuda:N`, of those that are there; `auto` prefers a GPU.

    Raises:
        ConfigurationError: there is none of the name, or this ONNX Runtime is not built for it.
    """
    found = _num_gpus()
    if name == "cpu" or (name == "auto" and not found):
        return "cpu"
    kind, _, number = name.partition(":")
    if name != "auto" and (kind != "cuda" or not (number or "0").isdecimal()):
        raise ConfigurationError(f"there is no device {name!r}: auto, cpu or cuda:N")
    index = int(number or 0)
    if index >= found:
        raise ConfigurationError(
            f"device {name!r} was asked for, and there are {found} NVIDIA GPUs with a driver that "
            "answers; use --device cpu"
        )
    if _CUDA not in onnxruntime.get_available_providers():
        raise ConfigurationError(
            f"ONNX Runtime {onnxruntime.__version__} as installed here knows no GPU: uninstall "
            "onnxruntime and pip install 'seqloss[onnx-gpu]', or use --device cpu"
        )
    return f"cuda:{index}"


def precisions_by_speed(device: str) -> tuple[Precision, ...]:
    """What runs on the device, in the order of preference.

    On a CPU ONNX Runtime has no 16-bit products, and int8 is faster, but an approximation: it is
    served where somebody asks for it, or exported nothing else.
    """
    if device_named(device) == "cpu":
        return ("float32", "int8")
    return ("bfloat16", "float16", "float32")


def _refuse_precision(precision: Precision, device: str) -> None:
    """What there are no kernels for would fail with less, or run where nobody asked for it."""
    if precision == "int8" and device != "cpu":
        raise ConfigurationError(
            "ONNX Runtime runs int8 graphs on CPUs only: on a GPU use bfloat16 or float16, or "
            "--device cpu"
        )
    if precision == "bfloat16" and device == "cpu":
        raise ConfigurationError(
            "ONNX Runtime has no bfloat16 on CPUs: use float32 or int8, or an NVIDIA GPU"
        )


def _num_gpus() -> int:
    """NVIDIA GPUs by the driver, which every machine with a working one has."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    works = driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0
    return count.value if works else 0


def _session(
    bundle: Bundle, graph: Graph, device: str, threads: int | None
) -> onnxruntime.InferenceSession:
    content = bundle.graph_archive(graph)
    options = session_options(_WARNING)
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1
    # As the file has it, block of classes by block: by default all of them are computed before the
    # first is used up, and a logits matrix is there after all.
    options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    # The shapes of batches never repeat, and a plan for each would be kept.
    options.enable_mem_pattern = False
    # Threads that wait for the next of a batch's thousand small steps do so awake, which is faster
    # by a twelfth; a server's cores are not its own between batches, and there they sleep.
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry("session.load_model_format", "ONNX")
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path",
        str((bundle.folder / graph.folder).resolve()),
    )
    providers: list[Any] = ["CPUExecutionProvider"]
    if device != "cpu":
        onnxruntime.preload_dlls()  # CUDA and cuDNN as pip installs them
        index = device.partition(":")[2]
        # Twice as much each time, as the default has it, is more than there is on a full device.
        settings = {"device_id": index, "arena_extend_strategy": "kSameAsRequested"}
        providers.insert(0, (_CUDA, settings))
    try:
        session = onnxruntime.InferenceSession(
            content,
            options,
            providers=providers,
            disabled_optimizers=_SLOW_FUSIONS if device == "cpu" else [],
            enable_fallback=0,  # to the CPU, with a line on stdout
        )
    # Its errors have no common class but this one.
    except Exception as error:
        hint = _SHARED_INT8_HINT if SHARED_INT8 in str(error) else ""
        raise BundleError(
            f"{bundle.folder / graph.path} does not load on {device}: {error}{hint}"
        ) from error
    _refuse_another_device(session, device)
    _refuse_another_signature(session, bundle, graph)
    return session


def _refuse_another_device(session: onnxruntime.InferenceSession, device: str) -> None:
    """ONNX Runtime takes the CPU without a word where libraries of the GPU are missing."""
    if device != "cpu" and _CUDA not in session.get_providers():
        raise ConfigurationError(
            f"ONNX Runtime {onnxruntime.__version__} could not use {device}: CUDA or cuDNN of the "
            "version that it was built for is missing (its warning above names the library); "
            "pip install 'seqloss[onnx-gpu]' brings them, or use --device cpu"
        )


def _refuse_another_signature(
    session: onnxruntime.InferenceSession, bundle: Bundle, graph: Graph
) -> None:
    inputs = tuple(value.name for value in session.get_inputs())
    outputs = tuple(value.name for value in session.get_outputs())
    if (inputs, outputs) != (LOSS_INPUTS, LOSS_OUTPUTS):
        raise BundleError(
            f"{bundle.folder / graph.path} takes {', '.join(inputs)} and gives "
            f"{', '.join(outputs)}: it is no loss graph"
        )


@contextmanager
def _device_errors() -> Iterator[None]:
    """Tells the errors of a full device and of a dead one from all others."""
    try:
        yield
    except MemoryError as error:
        raise OutOfMemoryError("the host has no memory left") from error
    # Classes of ONNX Runtime's errors say how it failed, and not what failed.
    except Exception as error:
        text = str(error)
        if any(sign in text for sign in ("allocate memory", "bad_alloc", "out of memory")):
            raise OutOfMemoryError(text) from error
        if any(sign in text for sign in ("CUDA failure", "CUDA error", "CUDNN failure", "CUBLAS")):
            raise EngineDeadError(f"the device failed: {text}") from error
        raise
