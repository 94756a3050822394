"""From hidden states and the output projection to token terms, without a logits matrix.

The full (K, V) matrix of logits is what makes scoring expensive in memory: 8,192 tokens over
256,206 classes are 8.4 GB.  Here a block of the vocabulary is projected, folded into a few numbers
per token, and forgotten.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

# Of 1,024 to 8,192 classes the smallest block was the fastest on a CPU: it stays in the cache.
VOCABULARY_BLOCK = 1024
TOKEN_BLOCK = 1024

# Stands for "not in the softmax": exp of it is exactly 0 beside any real logit, and unlike -inf it
# stays finite in products with a probability of 0.
ABSENT = -1e30


class OutputProjection(NamedTuple):
    """The last linear layer, with the mean over its classes made once.

    Attributes:
        weight: float32, or 16 bits for products in 16 bits. Shape: (V, D).
        bias: Shape: (V,), float32; `ABSENT` for classes kept out of the softmax.
        mean_weight: the mean of the kept rows of `weight`. Shape: (D,), float32.
        mean_bias: the mean of the kept entries of `bias`. Shape: (), float32.
        softcap: the bound that the model squashes its logits to, where it does.
    """

    weight: Tensor
    bias: Tensor
    mean_weight: Tensor
    mean_bias: Tensor
    softcap: float | None = None


def output_projection(
    weight: Tensor, bias: Tensor | None, excluded_classes: list[int]
) -> OutputProjection:
    """Prepares a projection; the means are accumulated in float64."""
    kept = torch.ones(len(weight), dtype=torch.bool)
    kept[excluded_classes] = False
    bias = torch.zeros(len(weight)) if bias is None else bias.detach().float().clone()
    mean_weight = weight.detach()[kept].double().mean(0).float()
    mean_bias = bias[kept].double().mean().float()
    return OutputProjection(weight, bias.masked_fill(~kept, ABSENT), mean_weight, mean_bias)


def token_terms(
    hidden: Tensor,
    projection: OutputProjection,
    labels: Tensor,
    *,
    with_ranks_and_entropies: bool = False,
    vocabulary_block: int = VOCABULARY_BLOCK,
    token_block: int = TOKEN_BLOCK,
) -> tuple[Tensor, ...]:
    """Token terms without a logits matrix.

    Equals, but for rounding and memory, with `z = hidden @ weight.T + bias`, or with a softcap
    `z = softcap * tanh(hidden @ weight.T / softcap) + bias`:

        logprobs = z.log_softmax(-1)
        target_logprob = logprobs.gather(-1, labels[:, None])[:, 0]
        mean_logprob = logprobs.mean(-1)
        rank = (z > z.gather(-1, labels[:, None])).sum(-1)
        entropy = -(logprobs.exp() * logprobs).sum(-1)

    Never holds more than (token_block, vocabulary_block) logits.

    Args:
        hidden: the decoder's last hidden states. Shape: (K, D), float32.
        projection: the output projection.
        labels: the target classes, none of them excluded. Shape: (K,), int64.
        with_ranks_and_entropies: whether `rank` and `entropy` are computed too.
        vocabulary_block: classes projected at a time.
        token_block: tokens projected at a time.

    Returns:
        target_logprob and mean_logprob, or these and rank (int32) and entropy. Shapes: (K,),
        float32, in nats.
    """
    blocks = [
        _block_terms(
            h,
            projection,
            y,
            with_ranks_and_entropies=with_ranks_and_entropies,
            vocabulary_block=vocabulary_block,
        )
        for h, y in zip(
            torch.split(hidden, token_block), torch.split(labels, token_block), strict=True
        )
    ]
    return tuple(torch.cat(parts) for parts in zip(*blocks, strict=True))


def _block_terms(
    hidden: Tensor,
    projection: OutputProjection,
    labels: Tensor,
    *,
    with_ranks_and_entropies: bool,
    vocabulary_block: int,
) -> tuple[Tensor, ...]:
    """`token_terms` for so few tokens that one block holds them.

    The sum over the *other* classes is accumulated, `lse_other`, and `nll = softplus(lse_other -
    z_y)` with z_y a float32 dot product of its own.  So nll is never negative, whatever the
    precision of the other logits, and a confident token loses no digits in the difference of two
    large numbers.
    """
    weight, bias, mean_weight, mean_bias, softcap = projection
    num_tokens, num_blocks = len(hidden), -(-len(weight) // vocabulary_block)
    target_rows = weight.index_select(0, labels)
    target_logit = _capped_((hidden * target_rows).sum(-1), softcap) + bias.index_select(0, labels)

    # One block of logits at a time lives, in memory that is taken once: allocators keep blocks that
    # come and go beside small tensors that stay, up to gigabytes of them.
    workspace = _Workspace(hidden, weight.dtype, vocabulary_block)
    lse_of_blocks = hidden.new_empty(num_tokens, num_blocks)
    entropy_of_blocks = torch.empty_like(lse_of_blocks) if with_ranks_and_entropies else None
    rank = torch.zeros_like(labels)
    logit_sum = hidden.new_zeros(num_tokens)
    for block in range(num_blocks):
        first = block * vocabulary_block
        rows, biases = (whole[first : first + vocabulary_block] for whole in (weight, bias))
        logits = workspace.logits(rows, biases, softcap)
        if softcap is not None:
            logit_sum += logits @ (biases > ABSENT).float()
        _remove_labels_(logits, labels - first)
        if entropy_of_blocks is not None:
            rank += workspace.count_above(logits, target_logit)
        largest = logits.amax(-1)
        logits.sub_(largest[:, None])
        exp = workspace.exp(logits, keep_logits=entropy_of_blocks is not None)
        total = exp.sum(-1)
        log_total = total.log()
        lse_of_blocks[:, block] = largest + log_total
        if entropy_of_blocks is not None:
            # log p = logit - largest - log_total, and neither of the two terms is negative.
            entropy_of_blocks[:, block] = log_total - exp.mul_(logits).sum(-1) / total

    lse_other = lse_of_blocks.logsumexp(-1)
    nll = softplus(lse_other - target_logit)
    # A softcap is no linear function, and the mean of its logits has to be summed up.
    mean_logit = (
        hidden @ mean_weight + mean_bias if softcap is None else logit_sum / (bias > ABSENT).sum()
    )
    mean_logprob = mean_logit - (target_logit + nll)
    if entropy_of_blocks is None:
        return -nll, mean_logprob

    # By the chain rule: which block, given another class; then whether the target or another one.
    # All terms are positive, so that nothing cancels.
    surprise = lse_other[:, None] - lse_of_blocks
    entropy_other = (torch.exp(-surprise) * (surprise + entropy_of_blocks)).sum(-1)
    nll_other = softplus(target_logit - lse_other)
    entropy = torch.exp(-nll) * nll + torch.exp(-nll_other) * (nll_other + entropy_other)
    return -nll, mean_logprob, rank.int(), entropy


class _Workspace:
    """Memory for one block of logits, and what is computed with it in place."""

    def __init__(self, hidden: Tensor, dtype: torch.dtype, vocabulary_block: int) -> None:
        self._hidden = hidden.to(dtype)
        size = len(hidden) * vocabulary_block
        self._logits = hidden.new_empty(size)
        self._products = self._logits if dtype == hidden.dtype else self._hidden.new_empty(size)
        self._exp: Tensor | None = None
        self._above: Tensor | None = None

    def logits(self, rows: Tensor, bias: Tensor, softcap: float | None) -> Tensor:
        """Shape: (K, block), float32."""
        logits, products = (
            memory[: len(self._hidden) * len(rows)].view(-1, len(rows))
            for memory in (self._logits, self._products)
        )
        if softcap is None and rows.dtype == torch.float32:
            return torch.addmm(bias, self._hidden, rows.t(), out=logits)
        torch.mm(self._hidden, rows.t(), out=products)
        if softcap is None:
            # The addition of the float32 bias widens products of 16 bits.
            return torch.add(products, bias, out=logits)
        if products.dtype != torch.float32:
            logits.copy_(products)
        return _capped_(logits, softcap).add_(bias)

    def exp(self, logits: Tensor, *, keep_logits: bool) -> Tensor:
        """Shape: (K, block); in place, unless the logits are needed once more."""
        if not keep_logits:
            return logits.exp_()
        if self._exp is None:
            self._exp = torch.empty_like(self._logits)
        return torch.exp(logits, out=self._exp[: logits.numel()].view_as(logits))

    def count_above(self, logits: Tensor, target_logit: Tensor) -> Tensor:
        """How many logits are greater than each token's target's. Shape: (K,), int64."""
        if self._above is None:
            self._above = torch.empty_like(self._logits, dtype=torch.bool)
        above = self._above[: logits.numel()].view_as(logits)
        return torch.gt(logits, target_logit[:, None], out=above).sum(-1)


def _capped_(logits: Tensor, softcap: float | None) -> Tensor:
    """In place."""
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


def _remove_labels_(logits: Tensor, labels: Tensor) -> None:
    """Puts `ABSENT` at each token's label, in place, where the label lies in this block."""
    position = labels.clamp(0, logits.shape[-1] - 1)[:, None]
    inside = (labels == position[:, 0])[:, None]
    logits.scatter_(-1, position, torch.where(inside, ABSENT, logits.gather(-1, position)))
