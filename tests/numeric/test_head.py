"""The loss head against the naive expression that it replaces."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from compiled_kernels import kernel_library
from seqloss.loss.compiled_head import CompiledHead
from seqloss.loss.graph_head import GraphHead
from seqloss.loss.head import LossHead, OutputProjection, output_projection

TOLERANCE = 2e-5


def by_loss_head(
    projection: OutputProjection, hidden: Tensor, labels: Tensor, **blocks: int
) -> Any:
    head = LossHead(projection, **blocks)
    return head.terms(hidden, labels, with_ranks_and_entropies=True)


def by_graph_head(
    projection: OutputProjection,
    hidden: Tensor,
    labels: Tensor,
    *,
    vocabulary_block: int = 1022,
    **_: int,
) -> Any:
    head = GraphHead(projection, projection.weight.dtype, columns=vocabulary_block + 2)
    return head(hidden, labels, torch.arange(len(labels)))


def by_compiled_head(projection: OutputProjection, hidden: Tensor, labels: Tensor, **_: int) -> Any:
    head = CompiledHead(projection, projection.weight.dtype, kernel_library())
    return head.terms(hidden, labels, with_ranks_and_entropies=True)


# What Torch runs, what graphs for other runtimes have inside, and, without a softcap, kernels.
HEADS = [by_loss_head, by_graph_head]
every_head = pytest.mark.parametrize("head", [*HEADS, by_compiled_head])


def naive_terms(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
    excluded: list[int],
    *,
    softcap: float | None = None,
    tie: float = TOLERANCE,
) -> dict[str, Tensor]:
    """From the full logits matrix, in float64; `rank` as the ranks that rounding allows."""
    logits = hidden.double() @ weight.double().T
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    logits = logits + bias.double()
    kept = [index for index in range(len(weight)) if index not in excluded]
    target = logits.gather(-1, labels[:, None])
    logits = logits[:, kept]
    logprobs = logits.log_softmax(-1)
    return {
        "target_logprob": (target - logits.logsumexp(-1, keepdim=True))[:, 0],
        "mean_logprob": logprobs.mean(-1),
        "entropy": -(logprobs.exp() * logprobs).sum(-1),
        "least_rank": (logits > target + tie).sum(-1),
        "largest_rank": (logits > target - tie).sum(-1) - 1,
    }


def random_head(vocabulary: int, tokens: int, scale: float = 1.0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(vocabulary * 1000 + tokens)
    hidden = torch.randn(tokens, 24, generator=generator)
    weight = torch.randn(vocabulary, 24, generator=generator) * scale
    bias = torch.randn(vocabulary, generator=generator)
    labels = torch.randint(0, vocabulary, (tokens,), generator=generator)
    return hidden, weight, bias, labels


@every_head
@pytest.mark.parametrize(
    ("vocabulary", "tokens", "vocabulary_block", "token_block"),
    [
        (101, 37, 2048, 1024),  # one block holds all
        (101, 37, 10, 8),  # blocks that do not divide
        (101, 37, 1, 1),  # blocks of one, in which the label is all there is
        (100, 40, 25, 20),  # blocks that divide
        (2, 3, 1, 2),
        (1, 1, 4, 4),  # a single class is certain
    ],
)
@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_terms_are_those_of_the_full_logits(
    vocabulary: int, tokens: int, vocabulary_block: int, token_block: int, scale: float, head: Any
) -> None:
    hidden, weight, bias, labels = random_head(vocabulary, tokens, scale)
    expected = naive_terms(hidden, weight, bias, labels, [])
    target_logprob, mean_logprob, rank, entropy = head(
        output_projection(weight, bias, []),
        hidden,
        labels,
        vocabulary_block=vocabulary_block,
        token_block=token_block,
    )
    tolerance = TOLERANCE * max(1.0, scale)
    assert (target_logprob - expected["target_logprob"]).abs().max() <= tolerance
    assert (mean_logprob - expected["mean_logprob"]).abs().max() <= tolerance
    assert (entropy - expected["entropy"]).abs().max() <= tolerance
    assert (rank >= expected["least_rank"]).all()
    assert (rank <= expected["largest_rank"].clamp(min=0)).all()
    assert target_logprob.dtype == mean_logprob.dtype == entropy.dtype == torch.float32


@every_head
@pytest.mark.parametrize("behind", [100.0, 5_000.0, 10_000.0, 1e6, 1e10])
def test_a_label_far_behind_has_a_finite_loss(behind: float, head: Any) -> None:
    """A bias of -10,000 is how checkpoints keep a class from being chosen."""
    hidden, weight, bias, labels = random_head(70, 30)
    bias[labels[::3]] = -behind
    digits = 2e-7 * behind
    expected = naive_terms(hidden, weight, bias, labels, [], tie=TOLERANCE + digits)
    target_logprob, mean_logprob, rank, entropy = head(
        output_projection(weight, bias, []), hidden, labels
    )
    for term, name in ((target_logprob, "target_logprob"), (mean_logprob, "mean_logprob")):
        assert (term - expected[name]).abs().max() <= TOLERANCE + digits
    assert (entropy - expected["entropy"]).abs().max() <= TOLERANCE
    assert (rank >= expected["least_rank"]).all()
    assert (rank <= expected["largest_rank"].clamp(min=0)).all()


@pytest.mark.parametrize("behind", [100.0, 5_000.0, 1e5, 1e9])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_label_far_behind_is_as_good_as_any_in_16_bits(dtype: torch.dtype, behind: float) -> None:
    """Though 1e5 is beyond a float16, and next to 5,000 a bfloat16 has 4,992 and 5,024."""
    hidden, weight, bias, labels = random_head(70, 30)
    bias[labels[::3]] = -behind
    hidden, weight = hidden.to(dtype).float(), weight.to(dtype).float()
    # Logits as far as 8 from the largest are rounded to the dtype, and what is added to them too.
    off = 16 * torch.finfo(dtype).eps
    tie = off + 2 * torch.finfo(dtype).eps * behind
    expected = naive_terms(hidden, weight, bias, labels, [], tie=tie)
    target_logprob, mean_logprob, rank, entropy = LossHead(
        output_projection(weight, bias, []), dtype=dtype
    ).terms(hidden, labels, with_ranks_and_entropies=True)
    for term, name in ((target_logprob, "target_logprob"), (mean_logprob, "mean_logprob")):
        assert (term - expected[name]).abs().max() <= off + 2e-7 * behind
    assert (entropy - expected["entropy"]).abs().max() <= off
    assert (rank >= expected["least_rank"]).all()
    assert (rank <= expected["largest_rank"].clamp(min=0)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_label_far_behind_has_its_rank_among_those_about_it(dtype: torch.dtype) -> None:
    """Thousands are within a step of 16 bits as it is at the largest logit's distance."""
    hidden, weight, bias, labels = random_head(5_000, 20, 0.2)
    hidden, weight = hidden.to(dtype).float(), weight.to(dtype).float()
    bias.zero_()
    bias[0] = 110
    labels = labels.clamp(min=1)
    off = 4 * torch.finfo(dtype).eps
    expected = naive_terms(hidden, weight, bias, labels, [], tie=off)
    assert (expected["largest_rank"] - expected["least_rank"]).max() <= 200
    head = LossHead(output_projection(weight, bias, []), dtype=dtype)
    _, _, rank, _ = head.terms(hidden, labels, with_ranks_and_entropies=True)
    assert (rank >= expected["least_rank"]).all()
    assert (rank <= expected["largest_rank"]).all()


@every_head
def test_excluded_classes_leave_the_softmax_the_mean_and_the_ranks(head: Any) -> None:
    hidden, weight, bias, _ = random_head(60, 25)
    excluded = [*range(40, 60), 7]
    labels = torch.arange(25) + 8
    expected = naive_terms(hidden, weight, bias, labels, excluded)
    target_logprob, mean_logprob, rank, entropy = head(
        output_projection(weight, bias, excluded), hidden, labels, vocabulary_block=16
    )
    assert (target_logprob - expected["target_logprob"]).abs().max() <= TOLERANCE
    assert (mean_logprob - expected["mean_logprob"]).abs().max() <= TOLERANCE
    assert (entropy - expected["entropy"]).abs().max() <= TOLERANCE
    assert (rank >= expected["least_rank"]).all()
    assert (rank <= expected["largest_rank"]).all()


@every_head
def test_no_loss_is_negative_however_sure_the_model_is(head: Any) -> None:
    """An exact target logit beside a rounded logsumexp makes such losses negative."""
    hidden, weight, bias, _ = random_head(300, 4000, scale=5.0)
    labels = (hidden @ weight.T + bias).argmax(-1)
    target_logprob, *_ = head(output_projection(weight, bias, []), hidden, labels)
    assert (target_logprob <= 0).all()
    assert (target_logprob > -1e-6).any(), "the test needs tokens near certainty"


def test_a_confident_token_keeps_its_digits() -> None:
    """Of two classes 30 nats apart the likelier one has a loss of exp(-30), not 0."""
    weight = torch.tensor([[30.0], [0.0]])
    target_logprob, _ = LossHead(output_projection(weight, None, [])).terms(
        torch.ones(1, 1), torch.tensor([0])
    )
    expected = -torch.log1p(torch.exp(torch.tensor(-30.0, dtype=torch.float64)))
    assert target_logprob.item() == pytest.approx(expected.item(), rel=1e-6)


@every_head
@pytest.mark.parametrize("vocabulary_block", [1000, 64])
def test_an_entropy_near_zero_keeps_its_digits_when_the_target_is_unlikely(
    vocabulary_block: int, head: Any
) -> None:
    """The model is sure, and wrong: large terms of both signs would cancel in the entropy."""
    hidden, weight, bias, _ = random_head(1000, 200, scale=2.0)
    logits = hidden.double() @ weight.double().T + bias.double()
    labels = logits.argmin(-1)
    expected = naive_terms(hidden, weight, bias, labels, [])
    target_logprob, _, _, entropy = head(
        output_projection(weight, bias, []), hidden, labels, vocabulary_block=vocabulary_block
    )
    sure = expected["entropy"] < 0.2
    assert sure.sum() > 10
    assert (target_logprob[sure] < -20).all()
    assert (entropy - expected["entropy"])[sure].abs().max() <= 5e-6
    assert (entropy >= 0).all()


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("excluded", [[], [*range(40, 101), 7]])
@pytest.mark.parametrize(("vocabulary_block", "token_block"), [(2048, 1024), (10, 8), (1, 37)])
@pytest.mark.parametrize("softcap", [2.0, 12.0, 1000.0])
def test_a_softcap_is_that_of_the_full_logits(
    softcap: float, vocabulary_block: int, token_block: int, excluded: list[int], head: Any
) -> None:
    hidden, weight, bias, labels = random_head(101, 37, scale=2.0)
    if excluded:
        labels = torch.arange(37) % 32 + 8
    expected = naive_terms(hidden, weight, bias, labels, excluded, softcap=softcap)
    uncapped = naive_terms(hidden, weight, bias, labels, excluded)
    difference = (uncapped["target_logprob"] - expected["target_logprob"]).abs().max()
    assert difference > 100 * TOLERANCE, "the test needs logits that the softcap changes"
    target_logprob, mean_logprob, rank, entropy = head(
        output_projection(weight, bias, excluded)._replace(softcap=softcap),
        hidden,
        labels,
        vocabulary_block=vocabulary_block,
        token_block=token_block,
    )
    tolerance = 2 * TOLERANCE  # as for other logits, by their scale
    assert (target_logprob - expected["target_logprob"]).abs().max() <= tolerance
    assert (mean_logprob - expected["mean_logprob"]).abs().max() <= tolerance
    assert (entropy - expected["entropy"]).abs().max() <= tolerance
    assert (rank >= expected["least_rank"]).all()
    assert (rank <= expected["largest_rank"].clamp(min=0)).all()


@pytest.mark.parametrize("excluded", [[], [*range(40, 101), 7]])
@pytest.mark.parametrize("softcap", [None, 12.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_16_bits_are_off_by_the_rounding_of_16_bits(
    dtype: torch.dtype, softcap: float | None, excluded: list[int]
) -> None:
    """Products are of hidden states rounded to 16 bits, and are rounded to 16 bits themselves.

    Each moves a logit by half a unit in the last place at most: of every one of its products the
    former, of their sum the latter.  A softcap is no steeper than the line.  Both the target's
    logit and a logsumexp, or any mean of logits, are off by no more than the worst logit.
    """
    hidden, weight, bias, labels = random_head(101, 37)
    if excluded:
        labels = torch.arange(37) % 32 + 8
    weight = weight.to(dtype)
    products = hidden.abs().double() @ weight.abs().double().T
    logits = hidden.double() @ weight.double().T
    unit = torch.finfo(dtype).eps / 2
    off = 1.01 * float((unit * (products + logits.abs())).max()) + TOLERANCE
    assert off < 0.4, "the test needs a bound that says something"
    expected = naive_terms(hidden, weight, bias, labels, excluded, softcap=softcap, tie=off)
    projection = output_projection(weight, bias, excluded)._replace(softcap=softcap)
    terms = [
        LossHead(projection, vocabulary_block=vocabulary_block, token_block=token_block).terms(
            hidden, labels, with_ranks_and_entropies=True
        )
        for vocabulary_block, token_block in [(2048, 1024), (10, 8), (1, 37)]
    ]
    target_logprob, mean_logprob, rank, entropy = terms[0]
    assert all(term.dtype == torch.float32 for term in (target_logprob, mean_logprob, entropy))
    assert (target_logprob <= 0).all()
    assert (target_logprob - expected["target_logprob"]).abs().max() <= off
    assert (mean_logprob - expected["mean_logprob"]).abs().max() <= 2 * off
    # Its derivative by a logit is p (log p + entropy): by all of them, at most twice the entropy.
    assert ((entropy - expected["entropy"]).abs() <= off * (2 * expected["entropy"] + 1)).all()
    assert (rank >= expected["least_rank"]).all()
    assert (rank <= expected["largest_rank"].clamp(min=0)).all()

    # The body of a 16-bit graph is summed in float32; blocks change the order, and now and then
    # the last bit of a rounded product.
    bit = 2 * unit * float(logits.abs().max())
    for others in terms[1:]:
        assert (others[0] <= 0).all()
        for one, other in zip((target_logprob, mean_logprob), others[:2], strict=True):
            assert (one - other).abs().max() <= bit
            assert (one - other).abs().mean() <= bit / 10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("softcap", [None, 100.0])
def test_no_loss_is_negative_in_16_bits(dtype: torch.dtype, softcap: float | None) -> None:
    hidden, weight, bias, _ = random_head(300, 1000, scale=5.0)
    labels = (hidden @ weight.T + bias).argmax(-1)
    projection = output_projection(weight.to(dtype), bias, [])._replace(softcap=softcap)
    target_logprob, _, _, entropy = LossHead(projection).terms(
        hidden, labels, with_ranks_and_entropies=True
    )
    assert (target_logprob <= 0).all()
    assert (entropy >= 0).all()
    assert (target_logprob > -1e-3).any(), "the test needs tokens near certainty"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 10.0])  # with the latter exp overflows, and is taken anew
def test_terms_without_ranks_are_the_same_bits(dtype: torch.dtype, scale: float) -> None:
    hidden, weight, bias, labels = random_head(500, 64, scale)
    head = LossHead(output_projection(weight.to(dtype), bias, []), vocabulary_block=64)
    short = head.terms(hidden, labels)
    long = head.terms(hidden, labels, with_ranks_and_entropies=True)
    assert len(short) == 2
    assert all(torch.equal(*pair) for pair in zip(short, long, strict=False))
    assert bool((short[0] < -100).any()) == (scale == 10.0)


def test_no_logits_matrix_is_ever_held() -> None:
    """Counted, not timed: the largest tensor made is far smaller than (tokens, vocabulary)."""

    class LargestTensor(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = function(*args, **(kwargs or {}))
            outputs = result if isinstance(result, (tuple, list)) else (result,)
            for output in outputs:
                if isinstance(output, Tensor) and output._base is None:
                    self.numel = max(self.numel, output.numel())
            return result

    hidden, weight, bias, labels = random_head(5000, 900)
    projection = output_projection(weight, bias, [])
    with LargestTensor() as largest:
        LossHead(projection, vocabulary_block=128, token_block=100).terms(
            hidden, labels, with_ranks_and_entropies=True
        )
    assert largest.numel <= max(128 * 100, weight.numel(), hidden.numel())
    assert largest.numel < 5000 * 900 / 20


@pytest.mark.parametrize(("classes", "columns"), [(101, 1024), (58_101, 1024), (256_206, 2048)])
def test_a_graph_of_many_classes_has_wider_blocks_and_not_more_of_them(
    classes: int, columns: int
) -> None:
    head = GraphHead(output_projection(torch.zeros(classes, 1), None, []), torch.float32)
    blocks = [value for name, value in head.named_buffers() if name.startswith("block_")]
    assert {block.shape for block in blocks} == {(1, columns)}
    assert len(blocks) == -(-classes // (columns - 2)) <= 128
