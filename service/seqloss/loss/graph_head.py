"""The loss head as a module that can be captured: for runtimes whose graphs have it inside."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from seqloss.loss.head import ABSENT, OutputProjection

# Columns of a block of logits, two of which are no classes: so few stay in the cache of a CPU.
_LEAST_COLUMNS = 1024
# More of them make a graph that takes minutes to export.
_MOST_BLOCKS = 128


class GraphHead(nn.Module):
    """Token terms without a logits matrix, for the definitions see `seqloss.loss.head.LossHead`.

    A graph has no loops: the vocabulary is unrolled into blocks, each a product, and all tokens of
    a batch are projected at once.

    Every block has a column for the target beside its classes.  The target's logit z_y, a float32
    dot product of its own, is put there, and -1e30 where the label itself stands, so that
    `log_softmax` of the block gives at that column `-log(1 + S)`, where S is the sum of
    `exp(z - z_y)` over the block's *other* classes: never positive, without overflow, and all that
    the other blocks need to know.  In a block where the label is not, -1e30 goes to one more
    column, which is none of the classes.
    """

    weight: Tensor
    bias: Tensor
    mean_weight: Tensor
    mean_bias: Tensor

    def __init__(
        self, projection: OutputProjection, dtype: torch.dtype, columns: int | None = None
    ) -> None:
        """Copies the projection into blocks.

        Args:
            projection: the output projection.
            dtype: of the products.
            columns: of a block, two more than it has classes; None for as many as are fast.
        """
        super().__init__()
        if columns is None:
            columns = _LEAST_COLUMNS
            while len(projection.weight) > _MOST_BLOCKS * (columns - 2):
                columns *= 2
        self._block = columns - 2
        self._dtype = dtype
        self._softcap = projection.softcap
        self._num_classes = int((projection.bias > ABSENT).sum())
        self.register_buffer("weight", projection.weight.float())
        self.register_buffer("bias", projection.bias)
        self.register_buffer("mean_weight", projection.mean_weight[:, None].clone())
        self.register_buffer("mean_bias", projection.mean_bias)
        weights = torch.split(projection.weight, self._block)
        biases = torch.split(projection.bias, self._block)
        for number, (rows, bias) in enumerate(zip(weights, biases, strict=True)):
            absent = columns - len(rows)
            block = torch.cat([rows.to(dtype), rows.new_zeros(absent, rows.shape[1], dtype=dtype)])
            padded = torch.cat([bias, bias.new_full((absent,), ABSENT)])
            self.register_buffer(f"block_{number}", block.t().contiguous())
            self.register_buffer(f"bias_{number}", padded)
            if self._softcap is not None:
                self.register_buffer(f"kept_{number}", (padded > ABSENT).float()[:, None])
        self._num_blocks = len(weights)

    def forward(self, hidden: Tensor, labels: Tensor, full_index: Tensor) -> tuple[Tensor, ...]:
        """Token terms of a batch.

        Args:
            hidden: the decoder's last hidden states. Shape: (K, D), float32.
            labels: the target classes, none of them excluded. Shape: (K,), int64.
            full_index: of which tokens rank and entropy are wanted; where it is empty they cost
                nothing. Shape: (E,), int64.

        Returns:
            target_logprob and mean_logprob, shapes (K,), and rank (int32) and entropy, shapes (E,);
            float32, in nats.
        """
        target_logit = (hidden * self.weight.index_select(0, labels)).sum(-1)
        target_logit = self._capped(target_logit) + self.bias.index_select(0, labels)
        lses, ranks, entropies = [], [], []
        logit_sum = torch.zeros_like(target_logit)
        for logits, classes_sum in self._blocks(hidden, labels, target_logit):
            logit_sum = logit_sum + classes_sum
            logprobs = logits.log_softmax(-1)
            # log(1 + S), with S as above. Shape: (K,).
            lse = -logprobs[:, self._block]
            lses.append(lse)
            wanted = logits.index_select(0, full_index)
            ahead = wanted > wanted[:, self._block : self._block + 1]
            ranks.append(ahead.to(torch.int32).sum(-1, dtype=torch.int32))
            wanted, own = logprobs.index_select(0, full_index), lse.index_select(0, full_index)
            # Without the target's own term. Shape: (E,).
            entropies.append(-(wanted.exp() * wanted).sum(-1) - torch.exp(-own) * own)
        block_lse = torch.stack(lses, dim=-1)
        nll = _log_of_sum(block_lse)
        lse = target_logit + nll
        if self._softcap is None:
            mean_logit = (hidden @ self.mean_weight)[:, 0] + self.mean_bias
        else:
            mean_logit = logit_sum / self._num_classes + self.mean_bias
        rank = torch.stack(ranks, dim=-1).sum(-1, dtype=torch.int32)
        entropy = _entropy(
            nll.index_select(0, full_index),
            block_lse.index_select(0, full_index),
            torch.stack(entropies, dim=-1),
        )
        return -nll, mean_logit - lse, rank, entropy

    def _blocks(
        self, hidden: Tensor, labels: Tensor, target_logit: Tensor
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Logits of one block after the other, prepared as above, and the sum of its capped ones.

        Shapes: (K, columns), float32, and (K,); the sum is 0 where there is no softcap.
        """
        states = hidden.to(self._dtype)
        column = torch.full_like(labels, self._block)
        values = torch.stack([torch.full_like(target_logit, ABSENT), target_logit], dim=-1)
        for number in range(self._num_blocks):
            logits = (states @ self.get_buffer(f"block_{number}")).float()
            classes_sum = torch.zeros_like(target_logit)
            if self._softcap is not None:
                logits = self._capped(logits)
                classes_sum = (logits @ self.get_buffer(f"kept_{number}"))[:, 0]
            logits = logits + self.get_buffer(f"bias_{number}")
            place = labels - number * self._block
            is_here = (place >= 0) & (place < self._block)
            place = torch.where(is_here, place, self._block + 1)
            yield logits.scatter(1, torch.stack([place, column], dim=-1), values), classes_sum

    def _capped(self, logits: Tensor) -> Tensor:
        if self._softcap is None:
            return logits
        return self._softcap * torch.tanh(logits / self._softcap)


def _log_of_sum(block_lse: Tensor) -> Tensor:
    """`log(1 + sum of S)` of the blocks' `log(1 + S)`. Shape: (K, blocks) to (K,)."""
    largest = block_lse.amax(-1)
    one = torch.exp(-largest)  # all of this is over exp(largest)
    sums = (torch.exp(block_lse - largest[:, None]) - one[:, None]).clamp(min=0)
    return (largest + torch.log(one + sums.sum(-1))).clamp(min=0)


def _entropy(nll: Tensor, block_lse: Tensor, block_entropy: Tensor) -> Tensor:
    """Of the whole softmax.

    A class of probability q in the softmax of its block has q * exp(block_lse - nll) in that of
    all, and neither a block's sum of q nor the rise of -log q is negative.

    Args:
        nll: of the target. Shape: (E,).
        block_lse: `log(1 + S)`. Shape: (E, blocks).
        block_entropy: the sum of -q log q over the block's other classes. Shape: (E, blocks).
    """
    share = torch.exp(block_lse - nll[:, None])
    rise = nll[:, None] - block_lse
    others = -torch.expm1(-block_lse)
    return (share * (block_entropy + rise * others)).sum(-1) + torch.exp(-nll) * nll
