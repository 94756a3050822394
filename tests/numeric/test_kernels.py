"""Each kernel against the definition of its operator, in float64; and rows against one another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from compiled_kernels import LEVELS
from seqloss.errors import BundleError
from seqloss.kernels.functions import AttentionSettings, KernelLibrary
from seqloss.kernels.modules import CompiledAttention, CompiledLinear, CompiledNorm
from seqloss.model import operators

pytestmark = pytest.mark.parametrize("kernel_library", LEVELS, indirect=True, scope="session")

# Sums of some hundred products of size 1 in float32.
TOLERANCE = 1e-5
# Half a unit in the last place of a bfloat16, relative to it.
ROUNDING = 2.0**-8

# A tile has 6 rows and a panel 16 or 64 columns: fewer, as many, one more, and more than a thread
# takes.
ROWS = [0, 1, 5, 6, 7, 241]
SIZES = [(16, 16), (32, 48), (64, 64), (130, 80), (258, 272)]


@pytest.fixture(params=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest, kernel_library: KernelLibrary) -> torch.dtype:
    found: torch.dtype = getattr(torch, request.param)
    if not kernel_library.multiplies(found):
        pytest.skip(f"this CPU does not multiply in {request.param}: it has no AVX512_BF16")
    return found


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape) + seed))


def largest_error(found: Tensor, expected: Tensor) -> float:
    """Beyond what rounding the result to its dtype brings about."""
    assert found.shape == expected.shape
    allowed = 0 if found.dtype == torch.float32 else ROUNDING * expected.abs()
    return float(((found.double() - expected).abs() - allowed).max()) if found.numel() else 0.0


def product(rows: int, inner: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Inputs, a weight and a bias, whose outputs are of size 1."""
    weight = random(columns, inner, seed=1) * inner**-0.5
    return random(rows, inner).to(dtype), weight.to(dtype), random(columns, seed=2)


# ---------------------------------------------------------------- products


@pytest.mark.parametrize("activation", operators.ACTIVATIONS)
@pytest.mark.parametrize("outputs", ["wide", "rounded"])
@pytest.mark.parametrize(("inner", "columns"), SIZES)
def test_a_linear_layer_is_what_it_is_defined_as(
    inner: int,
    columns: int,
    outputs: str,
    activation: str,
    dtype: torch.dtype,
    kernel_library: KernelLibrary,
) -> None:
    out = torch.float32 if outputs == "wide" else dtype
    for rows in ROWS:
        inputs, weight, bias = product(rows, inner, columns, dtype)
        for added in (bias, None):
            found = CompiledLinear(kernel_library, weight, added, activation, out)(inputs)
            expected = operators.linear(
                inputs.double(), weight.double(), added, activation, torch.float64
            )
            assert found.dtype == out
            assert largest_error(found, expected) <= TOLERANCE


@pytest.mark.parametrize(("inner", "columns"), SIZES)
def test_a_linear_layer_is_added_to_the_residual_in_float32(
    inner: int, columns: int, dtype: torch.dtype, kernel_library: KernelLibrary
) -> None:
    for rows in ROWS:
        inputs, weight, bias = product(rows, inner, columns, dtype)
        residual = random(rows, columns, seed=3)
        for added in (bias, None):
            layer = CompiledLinear(kernel_library, weight, added, "none", torch.float32)
            expected = operators.linear(
                inputs.double(), weight.double(), added, "none", torch.float64
            )
            found = layer(inputs, residual)
            assert found.dtype == torch.float32
            assert largest_error(found, residual.double() + expected) <= TOLERANCE
        assert torch.equal(residual, random(rows, columns, seed=3)), "it is the stream's still"


def test_activations_hold_where_they_are_steep_flat_and_zero(
    kernel_library: KernelLibrary,
) -> None:
    """One input to each output; gelu's approximation of erf is good to 1.5e-7."""
    values = torch.cat([torch.linspace(-120, 120, 4001), torch.zeros(1), torch.tensor([1e-30])])
    inputs = torch.stack([values, torch.zeros_like(values)], dim=1)
    weight = torch.tensor([[1.0, 0.0]]).repeat(16, 1)
    for activation, expected in operators.ACTIVATIONS.items():
        layer = CompiledLinear(kernel_library, weight, None, activation, torch.float32)
        found, wanted = layer(inputs)[:, 0].double(), expected(values.double())
        assert ((found - wanted).abs() <= 2e-6 * wanted.abs().clamp(min=1)).all(), activation


def test_what_is_no_number_stays_none(dtype: torch.dtype, kernel_library: KernelLibrary) -> None:
    """And stays in its row."""
    inputs, weight, bias = product(7, 64, 64, dtype)
    clean = inputs.clone()
    inputs[3, 5] = torch.nan
    for activation in ("none", "silu", "gelu", "gelu_tanh"):
        layer = CompiledLinear(kernel_library, weight, bias, activation, torch.float32)
        found, others = layer(inputs), [0, 1, 2, 4, 5, 6]
        assert found[3].isnan().all(), activation
        assert torch.equal(found[others], layer(clean)[others])


def test_a_row_of_a_product_depends_on_no_other_row(
    dtype: torch.dtype, kernel_library: KernelLibrary
) -> None:
    inputs, weight, bias = product(500, 258, 272, dtype)
    residual = random(500, 272, seed=3)
    layer = CompiledLinear(kernel_library, weight, bias, "gelu", dtype)
    sums = CompiledLinear(kernel_library, weight, bias, "none", torch.float32)
    together, added = layer(inputs), sums(inputs, residual)
    for chosen in (slice(0, 1), slice(3, 9), slice(6, 247), slice(499, 500), slice(None, None, 7)):
        assert torch.equal(layer(inputs[chosen]), together[chosen])
        assert torch.equal(sums(inputs[chosen], residual[chosen]), added[chosen])


# ---------------------------------------------------------------- norms


@pytest.mark.parametrize("width", [16, 48, 64, 512, 1040])
@pytest.mark.parametrize("has_bias", [True, False], ids=["layer", "rms"])
@pytest.mark.parametrize("wanted", [{0}, {1}, {0, 1}])
def test_a_norm_is_what_it_is_defined_as(
    wanted: set[int],
    has_bias: bool,
    width: int,
    dtype: torch.dtype,
    kernel_library: KernelLibrary,
) -> None:
    weight, bias = 1 + random(width) / 8, random(width, seed=1) if has_bias else None
    norm = CompiledNorm(kernel_library, weight, bias, 1e-6, dtype, frozenset(wanted))
    for rows in (0, 1, 7, 300):
        inputs = 3 * random(rows, width, seed=2) + 2  # moments of their own
        expected, _ = operators.norm(
            inputs.double(),
            weight.double(),
            None if bias is None else bias.double(),
            1e-6,
            torch.float64,
        )
        found = norm(inputs)
        for index in wanted:
            assert found[index].dtype == (dtype if index else torch.float32)
            assert largest_error(found[index], expected) <= TOLERANCE
        assert [one is None for one in found] == (
            [False, False] if dtype == torch.float32 else [0 not in wanted, 1 not in wanted]
        )


@pytest.mark.parametrize("has_bias", [True, False], ids=["layer", "rms"])
def test_a_row_of_a_norm_depends_on_no_other_row(
    has_bias: bool, dtype: torch.dtype, kernel_library: KernelLibrary
) -> None:
    weight, bias = random(512), random(512, seed=1) if has_bias else None
    norm = CompiledNorm(kernel_library, weight, bias, 1e-5, dtype, frozenset({0, 1}))
    inputs = random(400, 512, seed=2)  # enough for several threads
    for chosen in (slice(0, 1), slice(5, 90), slice(399, 400)):
        for alone, together in zip(norm(inputs[chosen]), norm(inputs), strict=True):
            assert torch.equal(alone, together[chosen])


def test_the_norm_of_a_constant_row_is_its_bias(kernel_library: KernelLibrary) -> None:
    """Its variance is 0, and stays so for values that leave a float32 few digits."""
    bias = random(64)
    norm = CompiledNorm(kernel_library, torch.ones(64), bias, 1e-5, torch.float32, frozenset({0}))
    for value in (0.0, 3.0, 4096.0):
        assert torch.equal(norm(torch.full((2, 64), value))[0], bias.expand(2, 64))


# ---------------------------------------------------------------- attention


def naive_attention(
    parts: tuple[Tensor, Tensor, Tensor], bounds: tuple[Tensor, ...], how: AttentionSettings
) -> Tensor:
    """Query by query, in float64."""
    queries, keys, values = (part.double().unflatten(1, (how.heads, -1)) for part in parts)
    rows = torch.empty_like(queries)
    for start, end, key_start, key_end in zip(*map(Tensor.tolist, bounds), strict=True):
        for place, row in enumerate(range(start, end)):
            seen = min(key_end, key_start + place + 1) if how.causal else key_end
            own = slice(key_start, seen)
            scores = how.scale * torch.einsum("hd,khd->hk", queries[row], keys[own])
            if how.bias is not None:
                reach = how.bias.shape[1] // 2
                distance = (torch.arange(seen - key_start) - place).clamp(-reach, reach)
                scores += how.bias[:, distance + reach]
            rows[row] = torch.einsum("hk,khd->hd", scores.softmax(-1), values[own])
    return rows.flatten(1)


def sequences(queries: list[int], keys: list[int]) -> tuple[Tensor, ...]:
    """Bounds of sequences of these lengths, one after the other."""
    ends = [torch.tensor(lengths).cumsum(0) for lengths in (queries, keys)]
    return (
        ends[0] - torch.tensor(queries),
        ends[0],
        ends[1] - torch.tensor(keys),
        ends[1],
    )


def attended_to(num_queries: int, num_keys: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, and keys and values that lie in one matrix, as a fused product leaves them."""
    keys, values = random(num_keys, 2 * columns, seed=1).chunk(2, dim=1)
    return random(num_queries, columns), keys, values


# Queries and keys of each sequence.
CASES = {
    "own": ([5, 1, 12, 7], [5, 1, 12, 7]),
    "one_query": ([1], [9]),
    "one_key": ([9], [1]),
    "more_than_a_panel": ([70, 3], [130, 64]),
    "long": ([300], [300]),
    "without_queries": ([0, 4, 0], [3, 5, 2]),
    "one_long_among_short": ([3, 1, 60, 2, 1, 3], [2, 5, 40, 2, 50, 1]),
}


@pytest.mark.parametrize("width", [16, 48, 64, 128])
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("reach", [None, 4, 400])
@pytest.mark.parametrize("case", CASES)
def test_attention_is_what_it_is_defined_as(
    case: str,
    reach: int | None,
    causal: bool,
    width: int,
    dtype: torch.dtype,
    kernel_library: KernelLibrary,
) -> None:
    queries, keys = CASES[case]
    heads = 2
    parts = attended_to(sum(queries), sum(keys), heads * width)
    bias = None if reach is None else 2 * random(heads, 2 * reach + 1, seed=3)
    how = AttentionSettings(bias, heads, width**-0.5, causal, dtype)
    bounds = sequences(queries, keys)
    found = CompiledAttention(kernel_library, how)(*parts, *bounds)
    assert found.dtype == dtype
    expected = naive_attention(parts, bounds, how)
    assert largest_error(found, expected) <= TOLERANCE
    plain = operators.attention(
        *(part.double() for part in parts), *bounds, *how[:-1], torch.double
    )
    assert largest_error(plain, expected) <= TOLERANCE


@pytest.mark.parametrize("width", [16, 64])
def test_sequences_share_keys(
    width: int, dtype: torch.dtype, kernel_library: KernelLibrary
) -> None:
    """Targets of one source, in an order that is not that of the sources."""
    parts = attended_to(11, 20, 2 * width)
    bounds = tuple(map(torch.tensor, ([0, 4, 5, 9], [4, 5, 9, 11], [8, 0, 8, 0], [20, 8, 20, 8])))
    how = AttentionSettings(None, 2, 0.3, causal=False, dtype=dtype)
    found = CompiledAttention(kernel_library, how)(*parts, *bounds)
    assert largest_error(found, naive_attention(parts, bounds, how)) <= TOLERANCE


@pytest.mark.parametrize("scale", [1.0, 30.0])  # with the latter exp of scores would overflow
def test_attention_to_scores_that_lie_far_apart(
    scale: float, kernel_library: KernelLibrary
) -> None:
    parts = attended_to(40, 40, 64)
    how = AttentionSettings(None, 2, scale, causal=True, dtype=torch.float32)
    found = CompiledAttention(kernel_library, how)(*parts, *sequences([40], [40]))
    expected = naive_attention(parts, sequences([40], [40]), how)
    assert largest_error(found, expected) <= scale * TOLERANCE


@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("reach", [None, 16])
def test_a_sequence_attends_as_if_it_were_alone(
    reach: int | None, causal: bool, dtype: torch.dtype, kernel_library: KernelLibrary
) -> None:
    lengths = [90, 1, 6, 7, 33, 150]
    parts = attended_to(sum(lengths), sum(lengths), 4 * 32)
    bias = None if reach is None else random(4, 2 * reach + 1, seed=3)
    how = AttentionSettings(bias, 4, 0.2, causal, dtype)
    attend = CompiledAttention(kernel_library, how)
    together = attend(*parts, *sequences(lengths, lengths))
    first = 0
    for length in lengths:
        own = slice(first, first + length)
        alone = attend(*(part[own] for part in parts), *sequences([length], [length]))
        assert torch.equal(alone, together[own])
        first += length


@pytest.mark.parametrize(
    ("queries", "keys"),
    [
        (([0, 3], [3, 9]), ([0, 4], [4, 8])),  # rows beyond the end
        (([0, 3], [3, 7]), ([0, 4], [4, 9])),  # keys beyond the end
        (([0, 2], [3, 7]), ([0, 4], [4, 8])),  # a row of two sequences
        (([0, 4], [3, 7]), ([0, 4], [4, 8])),  # a row of none
        (([0, 3], [3, 6]), ([0, 4], [4, 8])),  # a last row of none
        (([0, 9], [9, 7]), ([0, 4], [4, 8])),  # a length below 0
        (([-3, 0], [0, 7]), ([0, 4], [4, 8])),
        (([0, 3], [3, 7]), ([-1, 4], [4, 8])),
        (([0, 3], [3, 7]), ([4, 4], [4, 8])),  # no keys
        (([0, 3], [3, 7]), ([6, 4], [4, 8])),
        (([0, 3], [3, 7]), ([0, 2**62], [4, 2**62 + 4])),
    ],
)
def test_sequences_of_rows_that_are_not_there_are_refused(
    queries: Any, keys: Any, kernel_library: KernelLibrary
) -> None:
    how = AttentionSettings(None, 2, 1.0, causal=False, dtype=torch.float32)
    bounds = (torch.tensor(one) for one in (*queries, *keys))
    with pytest.raises(BundleError, match="rows that are not there"):
        CompiledAttention(kernel_library, how)(*attended_to(7, 8, 32), *bounds)


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: rows[:, :, None].expand(-1, -1, 8),  # of which a kernel would fill an eighth
        lambda rows: rows[:1].expand(len(rows), -1),  # as many as anybody likes, of one
        lambda rows: rows[:, :0],  # in which there is room for any number of heads
        lambda rows: rows.flatten()[: len(rows)],
        lambda rows: rows.double(),
        lambda rows: rows.to("meta"),
        lambda rows: rows.t().contiguous().t(),
    ],
    ids=["three_dimensions", "overlapping", "empty", "one_dimension", "double", "meta", "columns"],
)
def test_attention_is_of_rows_of_floats(change: Any, kernel_library: KernelLibrary) -> None:
    how = AttentionSettings(None, 2, 1.0, causal=False, dtype=torch.float32)
    parts = [change(part) for part in attended_to(7, 7, 32)]
    with pytest.raises(BundleError, match="do not belong together: an attention"):
        CompiledAttention(kernel_library, how)(*parts, *sequences([7], [7]))


@pytest.mark.parametrize("many", [2**45, 2**57])  # more than addresses, and than a vector holds
def test_too_little_memory_is_an_error_and_not_the_end(
    many: int, kernel_library: KernelLibrary
) -> None:
    how = AttentionSettings(None, 2, 1.0, causal=False, dtype=torch.float32)
    queries, keys, values = attended_to(7, 1, 32)
    far = [part.expand(many, -1) for part in (keys, values)]
    with pytest.raises(MemoryError):
        kernel_library.attention(queries, *far, sequences([7], [many]), how)


# ---------------------------------------------------------------- threads


def test_the_bits_do_not_depend_on_the_number_of_threads(
    dtype: torch.dtype, kernel_library: KernelLibrary
) -> None:
    inputs, weight, bias = product(500, 258, 272, dtype)
    layer = CompiledLinear(kernel_library, weight, bias, "silu", dtype)
    how = AttentionSettings(None, 4, 0.2, causal=True, dtype=dtype)
    attend = CompiledAttention(kernel_library, how)
    parts, bounds = attended_to(200, 200, 4 * 32), sequences([150, 50], [150, 50])
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append((layer(inputs), attend(*parts, *bounds)))
    finally:
        torch.set_num_threads(before)
    for others in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(results[0], others, strict=True))
