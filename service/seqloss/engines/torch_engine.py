"""Runs an exported model in Torch, on a CPU or an NVIDIA GPU, with our loss head on top."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from safetensors import safe_open
from torch.fx import GraphModule

from seqloss.bundle.manifest import Graph, Precision
from seqloss.bundle.reader import Bundle
from seqloss.engines import cpu_linear
from seqloss.engines.base import EngineInfo
from seqloss.engines.layout import BODY_INPUTS, padded
from seqloss.errors import (
    BundleError,
    ConfigurationError,
    EngineDeadError,
    OutOfMemoryError,
)
from seqloss.loss.head import LossHead, OutputProjection, matmul
from seqloss.records import Batch, TokenTerms

# Tokens and classes that the head projects at a time. On a CPU the smallest blocks of classes were
# the fastest, since they stay in the cache; a GPU wants kernels large enough to fill it.
_BLOCKS = {"cpu": (1024, 1024), "cuda": (4096, 8192)}


class TorchEngine:
    """One bundle's model on one device; see `seqloss.engines.base.Engine`."""

    def __init__(self, bundle: Bundle, graph: Graph, device: str) -> None:
        """Loads weights and a graph.

        Raises:
            BundleError: the graph and the weights do not belong together.
            ConfigurationError: there is no such device.
        """
        self._device = device_named(device)
        self._source_multiple = graph.source_multiple
        self._body, self._head = _load(bundle, graph, self._device)
        self._info = EngineInfo(
            "torch",
            str(self._device),
            graph.precision,
            torch.__version__,
            graph.source_multiple,
        )

    @property
    def info(self) -> EngineInfo:
        """What runs the model, where, in which precision."""
        return self._info

    def score(self, batch: Batch) -> TokenTerms:
        """See `Engine.score`."""
        with _device_errors(), torch.inference_mode():
            *inputs, labels = [
                torch.from_numpy(array).to(self._device)
                for array in padded(batch, self._source_multiple)
            ]
            terms = self._head.terms(
                self._body(*inputs),
                labels,
                with_ranks_and_entropies=batch.with_ranks_and_entropies,
            )
            return TokenTerms(*(term.cpu().numpy() for term in terms))

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
        found += ["bfloat16", "float16"] if major >= 8 else ["float16"]  # 8: Ampere
    else:
        # Torch before 2.13 does not say.
        has: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        if has.get("avx512_bf16") or has.get("amx_bf16"):
            found.append("bfloat16")
        if has.get("avx512_fp16") or has.get("amx_fp16"):
            found.append("float16")
    return (*found, "float32")


def _load(
    bundle: Bundle, graph: Graph, device: torch.device
) -> tuple[Callable[..., torch.Tensor], LossHead]:
    token_block, vocabulary_block = _BLOCKS.get(device.type, _BLOCKS["cpu"])
    linear = matmul
    try:
        with _Weights(bundle, graph, device) as weights:
            body = _module(bundle.graph_archive(graph), weights, device)
            dtype = getattr(torch, graph.precision)
            # Where the embeddings are the same matrix it is here in float32 already.
            exact = weights.has("output.weight", torch.float32)
            projection = OutputProjection(
                weights.get("output.weight", torch.float32 if exact else dtype),
                weights.get("output.bias", torch.float32),
                weights.get("output.mean_weight", torch.float32),
                weights.get("output.mean_bias", torch.float32),
                bundle.manifest.softcap,
            )
        if device.type == "cpu" and cpu_linear.is_available(dtype):
            linear = cpu_linear.prepacked
            with torch.no_grad():
                cpu_linear.prepack(body)
        head = LossHead(
            projection,
            dtype=dtype,
            vocabulary_block=vocabulary_block,
            token_block=token_block,
            linear=linear,
        )
    except (BundleError, torch.OutOfMemoryError):
        raise
    # A program that is malformed in a harmless way fails with whatever Torch stumbles over.
    except Exception as error:
        raise BundleError(
            f"{bundle.folder} has a graph or weights that do not load: {error}"
        ) from error
    return body, head


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


def _module(archive: bytes, weights: _Weights, device: torch.device) -> GraphModule:
    """The program as a callable module on the given weights."""
    program = torch.export.load(io.BytesIO(archive))
    expected = list(BODY_INPUTS)
    if list(program.graph_signature.user_inputs) != expected:
        raise BundleError(
            f"a graph takes {list(program.graph_signature.user_inputs)}, not {expected}"
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
