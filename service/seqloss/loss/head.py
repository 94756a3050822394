"""From hidden states and the output projection to token terms, without a logits matrix.

The full (K, V) matrix of logits is what makes scoring expensive in memory: 8,192 tokens over
256,206 classes are 8.4 GB.  Here a block of the vocabulary is projected, folded into a few numbers
per token, and forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

# Of 1,024 to 8,192 classes the smallest block was the fastest on a CPU: it stays in the cache.
VOCABULARY_BLOCK = 1024
TOKEN_BLOCK = 1024

# Its place among the terms.
_RANK = 2

# Stands for "not in the softmax": exp of it is exactly 0 beside any real logit, and unlike -inf it
# stays finite in products with a probability of 0.
ABSENT = -1e30

# Makes of rows of weights a function from states to products with them.
# Shapes: (C, D) to a function from (K, D) to (K, C), all of one dtype.
Linear = Callable[[Tensor], Callable[[Tensor], Tensor]]


class OutputProjection(NamedTuple):
    """The last linear layer, with the mean over its classes made once.

    Attributes:
        weight: float32 or 16 bits. Shape: (V, D).
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


def matmul(rows: Tensor) -> Callable[[Tensor], Tensor]:
    """The `Linear` that runs on any device."""
    return lambda states: states @ rows.t()


class LossHead:
    """Token terms without a logits matrix.

    They equal, but for rounding, with `z = hidden @ weight.T + bias`, or with a softcap
    `z = softcap * tanh(hidden @ weight.T / softcap) + bias`:

        logprobs = z.log_softmax(-1)
        target_logprob = logprobs.gather(-1, labels[:, None])[:, 0]
        mean_logprob = logprobs.mean(-1)
        rank = (z > z.gather(-1, labels[:, None])).sum(-1)
        entropy = -(logprobs.exp() * logprobs).sum(-1)

    Only a few blocks of (token_block, vocabulary_block) logits live at a time.

    The target's logit z_y is a float32 dot product of its own, and the sum of `exp(z - z_y)` is
    accumulated over the *other* classes: `nll = softplus(lse_other - z_y)` is never negative,
    whatever the precision of the products, and loses no digits in the difference of two large
    numbers.  z_y is subtracted within the product, as one more column of states and weights: sums
    are float32 there, so that of 16 bits all are spent on how far a logit is from the target's, and
    the largest logit need not be known before exp is taken.  The bias enters in the same way.
    """

    def __init__(
        self,
        projection: OutputProjection,
        *,
        dtype: torch.dtype | None = None,
        vocabulary_block: int = VOCABULARY_BLOCK,
        token_block: int = TOKEN_BLOCK,
        linear: Linear = matmul,
    ) -> None:
        """Copies the projection into blocks of classes.

        Args:
            projection: the output projection.
            dtype: of the products; the weight's unless it is given.
            vocabulary_block: classes projected at a time.
            token_block: tokens projected at a time.
            linear: what multiplies.
        """
        self._projection = projection
        self._dtype = dtype or projection.weight.dtype
        self._token_block = token_block
        weight, bias = projection.weight, projection.bias
        self._biases = torch.split(bias, vocabulary_block)
        self._products = [
            linear(self._columns(rows, biases))
            for rows, biases in zip(
                torch.split(weight, vocabulary_block), self._biases, strict=True
            )
        ]
        self._num_classes = int((bias > ABSENT).sum())
        starts = range(0, len(weight) + vocabulary_block, vocabulary_block)
        self._starts = torch.tensor(starts, device=weight.device)

    def terms(
        self, hidden: Tensor, labels: Tensor, *, with_ranks_and_entropies: bool = False
    ) -> tuple[Tensor, ...]:
        """Token terms of a batch.

        Args:
            hidden: the decoder's last hidden states. Shape: (K, D), float32.
            labels: the target classes, none of them excluded. Shape: (K,), int64.
            with_ranks_and_entropies: whether `rank` and `entropy` are computed too.

        Returns:
            target_logprob and mean_logprob, or these and rank (int32) and entropy. Shapes: (K,),
            float32, in nats.
        """
        blocks = zip(
            torch.split(hidden, self._token_block),
            torch.split(labels, self._token_block),
            strict=True,
        )
        parts = [self._block_terms(*block, all_terms=with_ranks_and_entropies) for block in blocks]
        return tuple(torch.cat(part) for part in zip(*parts, strict=True))

    def _block_terms(
        self, hidden: Tensor, labels: Tensor, *, all_terms: bool
    ) -> tuple[Tensor, ...]:
        """`terms` for so few tokens that one block holds them."""
        weight, bias, _, _, softcap = self._projection
        target_logit = (hidden * weight.index_select(0, labels)).sum(-1)
        target_logit = _capped_(target_logit, softcap) + bias.index_select(0, labels)
        tokens = _Tokens(hidden, labels, target_logit, self._rounded(target_logit))
        terms = self._terms_of(tokens, all_terms=all_terms)
        # Where another class is ahead of the label by 88 nats, exp does not fit into a float32.
        (rows,) = torch.nonzero(~(terms[0] > -torch.inf), as_tuple=True)
        if len(rows):
            behind = _Tokens(*(of[rows] for of in tokens))
            # The first time it is as coarse as a number of the label's logit's size is.
            for _ in range(2):
                behind = behind._replace(shift=self._rounded(behind.shift + self._lse(behind)))
            again = self._terms_of(behind, all_terms=all_terms)
            for place, term in enumerate(terms):
                # Who is ahead of the label is seen best from there.
                if place != _RANK:
                    term[rows] = again[place]
        return terms

    def _terms_of(self, tokens: _Tokens, *, all_terms: bool) -> tuple[Tensor, ...]:
        """The same, and an infinite loss where exp overflows."""
        _, _, mean_weight, mean_bias, softcap = self._projection
        remainder = tokens.target_logit - tokens.shift
        totals = remainder.new_empty(len(remainder), len(self._products))
        others = _Others(remainder, len(self._products)) if all_terms else None
        logit_sum = remainder.clone()
        for block, logits in enumerate(self._shifted_logits(tokens)):
            if others:
                others.add(block, logits)
            if softcap is not None:
                logit_sum += logits.masked_fill(logits <= ABSENT, 0).sum(-1)
            # float16 has too small a range for exp.
            exp = logits.float() if logits.dtype == torch.float16 else logits
            torch.sum(exp.exp_(), -1, dtype=torch.float32, out=totals[:, block])
        nll = softplus(totals.sum(-1).log() - remainder)
        # A softcap is no linear function, and the mean of its logits has to be summed up.
        mean_logit = (
            tokens.hidden @ mean_weight + mean_bias
            if softcap is None
            else tokens.shift + logit_sum / self._num_classes
        )
        mean_logprob = mean_logit - (tokens.target_logit + nll)
        return (-nll, mean_logprob, *(others.rank_and_entropy() if others else ()))

    def _lse(self, tokens: _Tokens) -> Tensor:
        """Of all classes but the label, less the shift, without overflow. Shape: (K,)."""
        of_blocks = [logits.float().logsumexp(-1) for logits in self._shifted_logits(tokens)]
        return torch.stack(of_blocks, dim=-1).logsumexp(-1)

    def _rounded(self, logits: Tensor) -> Tensor:
        """In float32, as the dtype of the products has them, with room for another logit."""
        room = torch.finfo(self._dtype).max / 2
        return logits.clamp(-room, room).to(self._dtype).float()

    def _shifted_logits(self, tokens: _Tokens) -> Iterator[Tensor]:
        """`z - shift` of one block of classes after the other, and -inf for labels.

        Shapes: (K, classes). In the dtype of the products, or in float32 where there is a softcap.
        Each may be written to, and is forgotten here.
        """
        softcap = self._projection.softcap
        states = self._states(tokens)
        order = tokens.labels.argsort()
        in_order = tokens.labels[order]
        # The labels of a block are a slice of the ordered ones.
        bounds = torch.searchsorted(in_order, self._starts).tolist()
        for block, multiply in enumerate(self._products):
            logits = multiply(states)
            if softcap is not None:
                logits = _capped_(logits.float(), softcap)
                logits.add_(self._biases[block]).sub_(tokens.shift[:, None])
            inside = slice(bounds[block], bounds[block + 1])
            first_class = block * len(self._biases[0])
            logits[order[inside], in_order[inside] - first_class] = -torch.inf
            yield logits

    def _columns(self, rows: Tensor, biases: Tensor) -> Tensor:
        """What the products multiply `_states` with. Shape: (classes, D + some)."""
        if self._projection.softcap is not None:  # it comes before the bias and the shift
            return rows.to(self._dtype)
        columns = [torch.full_like(biases, -1, dtype=self._dtype), *_parts(biases, self._dtype)]
        return torch.cat([rows.to(self._dtype), _aligned(columns)], dim=1)

    def _states(self, tokens: _Tokens) -> Tensor:
        """Hidden states, the shift, and ones for the parts of the bias. Shape: (K, D + some)."""
        hidden = tokens.hidden.to(self._dtype)
        if self._projection.softcap is not None:
            return hidden
        shift = tokens.shift.to(self._dtype)
        ones = [torch.ones_like(shift)] * len(_parts(shift, self._dtype))
        return torch.cat([hidden, _aligned([shift, *ones])], dim=1)


class _Tokens(NamedTuple):
    """What the head is asked for. Shapes: (K, D) and (K,).

    Attributes:
        hidden: float32.
        labels: int64.
        target_logit: float32.
        shift: what logits are relative to: that as the dtype of the products has it, or where the
            label is far behind about the largest of the others; in float32.
    """

    hidden: Tensor
    labels: Tensor
    target_logit: Tensor
    shift: Tensor


class _Others:
    """The classes beside the label: how many are ahead of it, and their entropy."""

    def __init__(self, remainder: Tensor, num_blocks: int) -> None:
        """`remainder` is the label's logit, less the shift. Shape: (K,)."""
        self._remainder = remainder
        self._rank = torch.zeros_like(remainder, dtype=torch.int32)
        self._lse = remainder.new_empty(len(remainder), num_blocks)
        self._entropy = torch.empty_like(self._lse)

    def add(self, block: int, shifted_logits: Tensor) -> None:
        """Takes a block of logits in, less the shift. Shape: (K, classes)."""
        self._rank += (shifted_logits > self._remainder[:, None]).sum(-1, dtype=torch.int32)
        logits = shifted_logits.float().clamp(min=ABSENT)
        largest = logits.amax(-1)
        exp = logits.sub_(largest[:, None]).exp()
        total = exp.sum(-1)
        log_total = total.log()
        self._lse[:, block] = largest + log_total
        # log p = logit - largest - log_total, and neither of the two terms is negative.
        self._entropy[:, block] = log_total - exp.mul_(logits).sum(-1) / total

    def rank_and_entropy(self) -> tuple[Tensor, Tensor]:
        """Of the whole softmax. By the chain rule: is it the label, if not which block, and where.

        All terms are positive, so that nothing cancels.
        """
        lse = self._lse.logsumexp(-1)
        surprise = lse[:, None] - self._lse
        entropy_other = (torch.exp(-surprise) * (surprise + self._entropy)).sum(-1)
        nll, nll_other = softplus(lse - self._remainder), softplus(self._remainder - lse)
        entropy = torch.exp(-nll) * nll + torch.exp(-nll_other) * (nll_other + entropy_other)
        return self._rank, entropy


def _parts(values: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Tensors of the dtype that add up to the float32 values, as far as its range goes."""
    parts: list[Tensor] = []
    rest = values
    for _ in range(1 if dtype == torch.float32 else 3):
        parts.append(rest.clamp(min=torch.finfo(dtype).min).to(dtype))
        rest = rest - parts[-1].float()
    return parts


def _aligned(columns: list[Tensor]) -> Tensor:
    """The columns, and zeros up to 8 of them: products want even sizes. Shape: (rows, 8)."""
    zero = torch.zeros_like(columns[0])
    return torch.stack([*columns, *[zero] * (8 - len(columns))], dim=1)


def _capped_(logits: Tensor, softcap: float | None) -> Tensor:
    """In place."""
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)
