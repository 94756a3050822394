"""The loss head by kernels, beyond what `test_head` asks of every head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from compiled_kernels import LEVELS
from numeric.test_head import TOLERANCE, naive_terms, random_head
from seqloss.errors import BundleError
from seqloss.kernels.functions import KernelLibrary
from seqloss.loss.compiled_head import CompiledHead
from seqloss.loss.head import OutputProjection, output_projection

pytestmark = pytest.mark.parametrize("kernel_library", LEVELS, indirect=True, scope="session")

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=DTYPES)
def dtype(request: pytest.FixtureRequest, kernel_library: KernelLibrary) -> torch.dtype:
    found: torch.dtype = request.param
    if not kernel_library.multiplies(found):
        pytest.skip(f"this CPU does not multiply in {found}: it has no AVX512_BF16")
    return found


@pytest.mark.parametrize("excluded", [[], [*range(40, 101), 7]])
@pytest.mark.parametrize("is_exact", [False, True])
@pytest.mark.parametrize("scale", [0.3, 1.0])
def test_weights_of_16_bits_are_off_by_the_rounding_of_16_bits(
    scale: float, is_exact: bool, excluded: list[int], kernel_library: KernelLibrary
) -> None:
    """Both factors are rounded, of a weight that is kept in float32, or one of them; sums are not.

    A label's own logit is of neither: it is off by what its weight was rounded before.
    """
    if not kernel_library.multiplies(torch.bfloat16):
        pytest.skip("this CPU has no AVX512_BF16")
    hidden, weight, bias, labels = random_head(101, 37, scale)
    if excluded:
        labels = torch.arange(37) % 32 + 8
    if not is_exact:
        weight = weight.bfloat16()
    products = hidden.abs().double() @ weight.abs().double().T
    factors = 2 if is_exact else 1
    off = 1.02 * float((factors * torch.finfo(torch.bfloat16).eps / 2 * products).max()) + TOLERANCE
    expected = naive_terms(hidden, weight, bias, labels, excluded, tie=off)
    head = CompiledHead(output_projection(weight, bias, excluded), torch.bfloat16, kernel_library)
    target_logprob, mean_logprob, rank, entropy = head.terms(
        hidden, labels, with_ranks_and_entropies=True
    )
    assert all(term.dtype == torch.float32 for term in (target_logprob, mean_logprob, entropy))
    assert (target_logprob <= 0).all()
    assert (target_logprob - expected["target_logprob"]).abs().max() <= off
    assert (mean_logprob - expected["mean_logprob"]).abs().max() <= 2 * off
    assert ((entropy - expected["entropy"]).abs() <= off * (2 * expected["entropy"] + 1)).all()
    assert (rank >= expected["least_rank"]).all()
    assert (rank <= expected["largest_rank"].clamp(min=0)).all()


def test_no_loss_is_negative(dtype: torch.dtype, kernel_library: KernelLibrary) -> None:
    hidden, weight, bias, _ = random_head(300, 1000, scale=5.0)
    labels = (hidden @ weight.T + bias).argmax(-1)
    head = CompiledHead(output_projection(weight.to(dtype), bias, []), dtype, kernel_library)
    target_logprob, _, _, entropy = head.terms(hidden, labels, with_ranks_and_entropies=True)
    assert (target_logprob <= 0).all()
    assert (entropy >= 0).all()
    assert (target_logprob > -1e-3).any(), "the test needs tokens near certainty"


@pytest.mark.parametrize("scale", [1.0, 10.0])  # with the latter exp overflows, and is taken anew
def test_terms_without_ranks_are_the_same_bits(
    dtype: torch.dtype, scale: float, kernel_library: KernelLibrary
) -> None:
    hidden, weight, bias, labels = random_head(500, 64, scale)
    head = CompiledHead(output_projection(weight.to(dtype), bias, []), dtype, kernel_library)
    short = head.terms(hidden, labels)
    long = head.terms(hidden, labels, with_ranks_and_entropies=True)
    assert len(short) == 2
    assert all(torch.equal(*pair) for pair in zip(short, long, strict=False))
    assert bool((short[0] < -100).any()) == (scale == 10.0)


@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_a_token_has_the_same_bits_in_any_company(
    dtype: torch.dtype, scale: float, kernel_library: KernelLibrary
) -> None:
    """Over several parts of the vocabulary, and where exp overflows too."""
    hidden, weight, bias, labels = random_head(2500, 300, scale)
    head = CompiledHead(output_projection(weight.to(dtype), bias, []), dtype, kernel_library)
    together = head.terms(hidden, labels, with_ranks_and_entropies=True)
    for chosen in (*(slice(i, i + 1) for i in range(40)), slice(5, 250), torch.arange(0, 300, 3)):
        alone = head.terms(hidden[chosen], labels[chosen], with_ranks_and_entropies=True)
        for one, all_of_them in zip(alone, together, strict=True):
            assert torch.equal(one, all_of_them[chosen])


@pytest.mark.parametrize("vocabulary", [1, 63, 64, 65, 1024, 1025, 5000])
def test_vocabularies_that_fill_their_panels_and_that_do_not(
    vocabulary: int, kernel_library: KernelLibrary
) -> None:
    hidden, weight, bias, labels = random_head(vocabulary, 20)
    expected = naive_terms(hidden, weight, bias, labels, [])
    head = CompiledHead(output_projection(weight, bias, []), torch.float32, kernel_library)
    found = head.terms(hidden, labels, with_ranks_and_entropies=True)
    for term, name in zip(
        (found[0], found[1], found[3]), ("target_logprob", "mean_logprob", "entropy"), strict=True
    ):
        assert (term - expected[name]).abs().max() <= TOLERANCE, name
    assert (found[2] >= expected["least_rank"]).all()
    assert (found[2] <= expected["largest_rank"].clamp(min=0)).all()


def test_what_is_no_number_stays_none(dtype: torch.dtype, kernel_library: KernelLibrary) -> None:
    hidden, weight, bias, labels = random_head(101, 9)
    head = CompiledHead(output_projection(weight.to(dtype), bias, []), dtype, kernel_library)
    clean = head.terms(hidden, labels, with_ranks_and_entropies=True)
    hidden[4, 3] = torch.nan
    found = head.terms(hidden, labels, with_ranks_and_entropies=True)
    assert found[0][4].isnan()
    assert found[1][4].isnan()
    others = [index for index in range(9) if index != 4]
    assert all(
        torch.equal(*(term[others] for term in pair)) for pair in zip(found, clean, strict=True)
    )


def test_there_is_no_kernel_for_a_softcap_an_odd_width_or_float16(
    kernel_library: KernelLibrary,
) -> None:
    _, weight, bias, _ = random_head(50, 1)
    projection = output_projection(weight, bias, [])
    assert CompiledHead.fits(projection, torch.float32, kernel_library)
    assert not CompiledHead.fits(projection._replace(softcap=3.0), torch.float32, kernel_library)
    assert not CompiledHead.fits(projection, torch.float16, kernel_library)
    odd = output_projection(weight[:, :23], bias, [])
    assert not CompiledHead.fits(odd, torch.float32, kernel_library)


@pytest.mark.parametrize(
    "states",
    [
        torch.zeros(5, 22),
        torch.zeros(4, 24),
        torch.zeros(5, 24, 1),
        torch.zeros(120),
        torch.zeros(5, 24, dtype=torch.bfloat16),
        torch.zeros(5, 24, dtype=torch.float64),
    ],
)
def test_states_that_are_not_the_projections_are_refused(
    states: Tensor, kernel_library: KernelLibrary
) -> None:
    _, weight, bias, _ = random_head(50, 1)
    head = CompiledHead(output_projection(weight, bias, []), torch.float32, kernel_library)
    with pytest.raises(BundleError, match="states"):
        head.terms(states, torch.zeros(5, dtype=torch.int64))


@pytest.mark.parametrize("label", [-1, 50, 2**40])
def test_labels_that_are_no_classes_are_refused(label: int, kernel_library: KernelLibrary) -> None:
    hidden, weight, bias, labels = random_head(50, 5)
    head = CompiledHead(output_projection(weight, bias, []), torch.float32, kernel_library)
    labels[3] = label
    with pytest.raises(ValueError, match="no classes"):
        head.terms(hidden, labels)


def of(**changes: Any) -> OutputProjection:
    _, weight, bias, _ = random_head(50, 1)
    return output_projection(weight, bias, [])._replace(**changes)


@pytest.mark.parametrize(
    "projection",
    [
        of(bias=torch.zeros(49)),
        of(bias=torch.zeros(50, 1)),
        of(mean_weight=torch.zeros(23)),
        of(mean_bias=torch.zeros(0)),
    ],
    ids=["a_bias_less", "a_bias_of_two_dimensions", "a_mean_weight_less", "no_mean_bias"],
)
def test_sizes_that_do_not_belong_together_are_refused(
    projection: OutputProjection, kernel_library: KernelLibrary
) -> None:
    with pytest.raises(BundleError, match="do not belong together"):
        CompiledHead(projection, torch.float32, kernel_library)
