"""What kernels take over of a graph, and what is said of it."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from checkpoints import save_checkpoint, sized
from seqloss.bundle.graph_archive import distil
from seqloss.bundle.reader import Bundle, open_bundle
from seqloss.engines.binding import Bound, bind
from seqloss.engines.loader import load_engine
from seqloss.engines.packed_program import module_of
from seqloss.export.exporter import ExportOptions, export_checkpoint
from seqloss.kernels.functions import KernelLibrary

WIDTH = 64
_OPS: Any = torch.ops.seqloss


class Layer(nn.Module):
    """A linear layer of ours, and whatever comes after it."""

    def __init__(self, then: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH, generator=generator), False)
        self.bias = nn.Parameter(torch.randn(WIDTH, generator=generator), False)
        self._then = then

    def forward(self, inputs: Tensor) -> Tensor:
        return self._then(_OPS.linear(inputs, self.weight, self.bias, "none", torch.float32))


def read(program: ExportedProgram) -> GraphModule:
    """As it comes out of a bundle."""
    file = io.BytesIO()
    torch.export.save(program, file)
    weights = program.state_dict
    return module_of(distil(file.getvalue()), lambda name, _: weights[name], ("inputs",))


def bound(then: Callable[[Tensor], Tensor], library: KernelLibrary | None) -> Bound:
    inputs = torch.ones(5, WIDTH)
    rows = {0: torch.export.Dim("rows", min=3, max=100)}
    with torch.no_grad():
        program = torch.export.export(Layer(then), (inputs,), dynamic_shapes=[rows])
        found = bind(module := read(program), library)
        torch.testing.assert_close(module(inputs), Layer(then)(inputs))
    return found


@pytest.mark.parametrize(
    "then",
    [lambda rows: rows * 2 + 1, lambda rows: torch.chunk(rows, 2, dim=-1)[0], lambda rows: rows],
)
def test_what_treats_each_row_by_itself_leaves_bits_alone(
    then: Callable[[Tensor], Tensor], kernel_library: KernelLibrary
) -> None:
    assert bound(then, kernel_library).is_all_compiled


@pytest.mark.parametrize(
    "then",
    [
        lambda rows: rows @ rows.t(),
        lambda rows: torch.softmax(rows, 0),
        lambda rows: torch.nn.functional.linear(rows, rows[:3]),
    ],
)
def test_what_may_mix_rows_is_seen(
    then: Callable[[Tensor], Tensor], kernel_library: KernelLibrary
) -> None:
    found = bound(then, kernel_library)
    assert found.num_compiled == 1
    assert found.num_others
    assert not found.is_all_compiled


def test_without_kernels_nothing_is_compiled() -> None:
    assert bound(lambda rows: rows, None) == Bound(0, 1, 0)


@pytest.fixture(scope="module")
def half_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("half")
    save_checkpoint("marian", folder / "checkpoint", **sized("marian", "wide"))
    options = ExportOptions(engines=("torch",), precisions=("float32", "float16"))
    export_checkpoint(str(folder / "checkpoint"), folder / "bundle", options)
    return open_bundle(folder / "bundle")


@pytest.mark.parametrize(("precision", "has_them"), [("float32", True), ("float16", False)])
def test_an_engine_says_whether_kernels_compute(
    precision: Any, has_them: bool, half_bundle: Bundle, kernel_library: KernelLibrary
) -> None:
    engine = load_engine(half_bundle, "cpu", precision)
    assert engine.info.has_kernels == has_them
    assert engine.info.is_batch_invariant == has_them
    engine.close()


def test_an_encoder_alone_may_scale_its_embeddings(tmp_path: Path) -> None:
    """Blenderbot's small sibling does, whatever its configuration says of both sides."""
    checkpoint = save_checkpoint("blenderbot-small", tmp_path / "checkpoint", scale_embedding=True)
    manifest = export_checkpoint(str(checkpoint), tmp_path / "bundle", ExportOptions())
    graphs = {graph.precision: graph for graph in manifest.graphs}
    assert graphs["float32"].layout == "packed"
    assert graphs["float32"].max_error < 2e-5
