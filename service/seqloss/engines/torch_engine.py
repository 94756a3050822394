"""Runs an exported model in Torch, on a CPU or an NVIDIA GPU, with our loss head on top."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch.fx import GraphModule

from seqloss.bundle.manifest import Graph, Precision
from seqloss.bundle.reader import Bundle
from seqloss.engines import cpu_linear
from seqloss.engines.base import EngineInfo
from seqloss.engines.binding import Bound, bind
from seqloss.engines.cuda_binding import bind as bind_for_cuda
from seqloss.engines.cuda_head import triton_head
from seqloss.engines.cuda_staging import CudaStaging
from seqloss.engines.layout import BODY_INPUTS, PackedInputs, PaddedInputs, packed, padded
from seqloss.engines.packed_program import module_of
from seqloss.errors import (
    BundleError,
    ConfigurationError,
    EngineDeadError,
    OutOfMemoryError,
)
from seqloss.kernels.functions import KernelLibrary
from seqloss.loss.compiled_head import CompiledHead
from seqloss.loss.head import LossHead, OutputProjection, matmul
from seqloss.records import Batch, TokenTerms

# Tokens and classes that the head projects at a time. On a CPU the smallest blocks of classes were
# the fastest, since they stay in the cache; a GPU wants kernels large enough to fill it.
_BLOCKS = {"cpu": (1024, 1024), "cuda": (4096, 8192)}
# The first generation of GPUs that has bfloat16 and the flash kernel.
_AMPERE = 8


class _Head(Protocol):
    """See `seqloss.loss.head.LossHead`."""

    def terms(
        self,
        hidden: torch.Tensor,
        labels: torch.Tensor,
        *,
        with_ranks_and_entropies: bool = False,
    ) -> tuple[torch.Tensor, ...]: ...


class TorchEngine:
    """One bundle's model on one device; see `seqloss.engines.base.Engine`."""

    def __init__(
        self, bundle: Bundle, graph: Graph, device: str, library: KernelLibrary | None = None
    ) -> None:
        """Loads weights and a graph.

        Args:
            bundle: opened.
            graph: of the bundle.
            device: see `device_named`.
            library: kernels for a CPU; without them, and elsewhere, Torch's own operators compute.

        Raises:
            BundleError: the graph and the weights do not belong together.
            ConfigurationError: there is no such device.
            EngineDeadError: the device failed.
        """
        self._device = device_named(device)
        self._staging = CudaStaging(self._device) if self._device.type == "cuda" else None
        self._graph = graph
        library = library if self._device.type == "cpu" else None
        with _current(self._device):
            loaded = _load(bundle, graph, self._device, library)
        self._body, self._head = loaded.body, loaded.head
        self._info = EngineInfo(
            "torch",
            str(self._device),
            graph.precision,
            torch.__version__,
            graph.source_multiple,
            is_packed=graph.layout == "packed",
            has_kernels=loaded.has_kernels,
            is_batch_invariant=loaded.has_kernels_only,
        )

    @property
    def info(self) -> EngineInfo:
        """What runs the model, where, in which precision."""
        return self._info

    def score(self, batch: Batch) -> TokenTerms:
        """See `Engine.score`."""
        with _device_errors(), torch.inference_mode(), _current(self._device):
            *inputs, labels = self._inputs(batch)
            terms = self._head.terms(
                self._body(*inputs),
                labels,
                with_ranks_and_entropies=batch.with_ranks_and_entropies,
            )
            return TokenTerms(*self._arrays(terms))

    def _inputs(self, batch: Batch) -> list[torch.Tensor]:
        """What the body takes, and labels."""
        inputs = self._laid_out(batch)
        if self._staging:
            return self._staging.inputs(inputs)
        return [torch.from_numpy(array) for array in inputs]

    def _arrays(self, terms: Sequence[torch.Tensor]) -> list[Any]:
        if self._staging:
            return self._staging.terms(terms)
        return [term.numpy() for term in terms]

    def _laid_out(self, batch: Batch) -> PackedInputs | PaddedInputs:
        if self._graph.layout == "packed":
            return packed(batch)
        return padded(batch, self._graph.source_multiple)

    def release_memory(self) -> None:
        """See `Engine.release_memory`."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def memory_bytes(self) -> Mapping[str, int]:
        """See `Engine.memory_bytes`; on a CPU the process's own metrics tell, and this is empty."""
        if self._device.type != "cuda":
            return {}
        used = torch.cuda.memory_allocated(self._device)
        return {"used": used, "cached": torch.cuda.memory_reserved(self._device) - used}

    def close(self) -> None:
        """Frees the device's memory."""
        del self._body, self._head
        self.release_memory()


def device_named(name: str) -> torch.device:
    """The device, of those that are there; `auto` prefers a GPU.

    Raises:
        ConfigurationError: there is none of the name.
    """
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigurationError(f"there is no device {name!r}: auto, cpu or cuda:N") from error
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise ConfigurationError(f"the Torch engine does not run on {name!r}: auto, cpu or cuda:N")
    if not torch.cuda.is_available():
        raise ConfigurationError(
            f"device {name!r} was asked for, and Torch {torch.__version__} finds no NVIDIA GPU; "
            "install a CUDA build of Torch and a driver, or use --device cpu"
        )
    index = device.index or 0
    if index >= torch.cuda.device_count():
        raise ConfigurationError(
            f"device {name!r} was asked for, and there are {torch.cuda.device_count()} GPUs"
        )
    return torch.device("cuda", index)


def precisions_by_speed(device: torch.device) -> tuple[Precision, ...]:
    """What the device computes in hardware, the fastest first.

    On a CPU without 16-bit products emulated ones are slower than float32. float16 stands behind
    bfloat16, which cannot overflow, and is as fast.
    """
    found: list[Precision] = []
    if device.type == "cuda":
        major, _ = torch.cuda.get_device_capability(device)
        found += ["bfloat16", "float16"] if major >= _AMPERE else ["float16"]
    else:
        # Torch before 2.13 does not say.
        has: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        if has.get("avx512_bf16") or has.get("amx_bf16"):
            found.append("bfloat16")
        if has.get("avx512_fp16") or has.get("amx_fp16"):
            found.append("float16")
    return (*found, "float32")


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A model.

    Attributes:
        body: the graph.
        head: the loss head.
        has_kernels: whether kernels compute any of it.
        has_kernels_only: whether they compute all of it, with which batches change no bits.
    """

    body: Callable[..., torch.Tensor]
    head: _Head
    has_kernels: bool
    has_kernels_only: bool


def _load(
    bundle: Bundle, graph: Graph, device: torch.device, library: KernelLibrary | None
) -> _Loaded:
    dtype = getattr(torch, graph.precision)
    try:
        with _Weights(bundle, graph, device) as weights:
            body = _module(bundle.graph_archive(graph), graph.layout, weights, device)
            # Where the embeddings are the same matrix it is here in float32 already.
            exact = weights.has("output.weight", torch.float32)
            projection = OutputProjection(
                weights.get("output.weight", torch.float32 if exact else dtype),
                weights.get("output.bias", torch.float32),
                weights.get("output.mean_weight", torch.float32),
                weights.get("output.mean_bias", torch.float32),
                bundle.manifest.softcap,
            )
        if len(projection.weight) != bundle.manifest.vocabulary.classes:
            raise BundleError(
                f"{bundle.folder} says that it has {bundle.manifest.vocabulary.classes} classes, "
                f"and its output projection has {len(projection.weight)}"
            )
        head = _head(projection, dtype, device, library)
        bound = _lay_out(body, graph, library) if device.type == "cpu" else Bound(0, 0, 0)
        if device.type == "cuda" and graph.layout == "packed":
            bind_for_cuda(body, with_flash=_has_flash(device))
        has_head = isinstance(head, CompiledHead)
        return _Loaded(
            body, head, has_head or bound.num_compiled > 0, has_head and bound.is_all_compiled
        )
    except (BundleError, torch.OutOfMemoryError):
        raise
    except torch.AcceleratorError as error:
        raise EngineDeadError(
            f"the device failed while {bundle.folder} was loaded: {error}"
        ) from error
    # A program that is malformed in a harmless way fails with whatever Torch stumbles over.
    except Exception as error:
        raise BundleError(
            f"{bundle.folder} has a graph or weights that do not load: {error}"
        ) from error


def _has_flash(device: torch.device) -> bool:
    major, _ = torch.cuda.get_device_capability(device)
    return major >= _AMPERE and torch.backends.cuda.is_flash_attention_available()


def _lay_out(body: GraphModule, graph: Graph, library: KernelLibrary | None) -> Bound:
    """Has the graph's products run on weights that are laid out once, for the CPU."""
    with torch.no_grad():
        if graph.layout == "packed":
            return bind(body, library)
        if cpu_linear.is_available(getattr(torch, graph.precision)):
            cpu_linear.prepack(body)
        return Bound(0, 0, 0)


def _head(
    projection: OutputProjection,
    dtype: torch.dtype,
    device: torch.device,
    library: KernelLibrary | None,
) -> _Head:
    if library is not None and CompiledHead.fits(projection, dtype, library):
        return CompiledHead(projection, dtype, library)
    if device.type == "cuda" and (head := triton_head(projection, dtype)):
        return head
    token_block, vocabulary_block = _BLOCKS.get(device.type, _BLOCKS["cpu"])
    is_laid_out = device.type == "cpu" and cpu_linear.is_available(dtype)
    return LossHead(
        projection,
        dtype=dtype,
        vocabulary_block=vocabulary_block,
        token_block=token_block,
        linear=cpu_linear.prepacked if is_laid_out else matmul,
    )


class _Weights(AbstractContextManager["_Weights"]):
    """A bundle's weights in the dtypes that graphs ask for, each cast once and shared."""

    def __init__(self, bundle: Bundle, graph: Graph, device: torch.device) -> None:
        self._file: Any = safe_open(bundle.weights_path(graph), framework="pt", device=str(device))
        self._aliases = bundle.manifest.weight_aliases
        self._made: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def has(self, name: str, dtype: torch.dtype) -> bool:
        """Whether somebody asked for the weight in this dtype."""
        return (self._aliases.get(name, name), dtype) in self._made

    def get(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """The weight; a copy in another precision is made without keeping the original."""
        key = self._aliases.get(name, name), dtype
        if key not in self._made:
            self._made[key] = self._file.get_tensor(key[0]).to(dtype)
        return self._made[key]

    def __exit__(self, *_: object) -> None:
        self._file.__exit__(None, None, None)


def _module(archive: bytes, layout: str, weights: _Weights, device: torch.device) -> GraphModule:
    """The program as a callable module on the given weights."""
    inputs = BODY_INPUTS[layout]
    if layout == "packed":
        return module_of(archive, weights.get, inputs)
    program = torch.export.load(io.BytesIO(archive))
    if program.graph_signature.user_inputs != inputs:
        raise BundleError(
            f"a graph takes {list(program.graph_signature.user_inputs)}, not {list(inputs)}"
        )
    if device.type != "cpu":
        from torch.export.passes import move_to_device_pass  # noqa: PLC0415 - a slow import

        # Export burnt the CPU in. The program's own weights are placeholders on the meta device,
        # which have nothing to move: hence a mapping, and not just the new device.
        program = move_to_device_pass(program, {"cpu": str(device)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = program.module()
    state = {
        name: weights.get(name, placeholder.dtype)
        for name, placeholder in module.state_dict().items()
    }
    module.load_state_dict(state, assign=True)
    return module


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Has kernels that are not Torch's own, and pinned memory, be of this GPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@contextmanager
def _device_errors() -> Iterator[None]:
    """Tells the errors of a full device and of a dead one from all others."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError(str(error)) from error
    except torch.AcceleratorError as error:
        raise EngineDeadError(f"the device failed: {error}") from error
    except RuntimeError as error:
        if "allocate memory" in str(error):  # the CPU allocator has no error class of its own
            raise OutOfMemoryError(str(error)) from error
        raise
    except MemoryError as error:
        raise OutOfMemoryError("the host has no memory left") from error
