"""The loss head by compiled kernels; the same arithmetic as `seqloss.loss.head`, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

from seqloss.errors import BundleError
from seqloss.kernels.functions import ClassSums, HeadTokens, KernelLibrary
from seqloss.loss.head import OutputProjection

# In nats. Up to here the difference of two such numbers is good to some 3e-6.
_LARGEST_LEAD = 8


class CompiledHead:
    """Token terms whose logits never leave the CPU's registers; see `seqloss.loss.head.LossHead`.

    A softcap has no kernel.
    """

    def __init__(
        self, projection: OutputProjection, dtype: torch.dtype, library: KernelLibrary
    ) -> None:
        """Copies the projection into panels.

        Args:
            projection: the output projection, without a softcap.
            dtype: of the products.
            library: has kernels for the dtype.
        """
        classes, width = projection.weight.shape
        expected = ((classes,), (width,), ())
        if tuple(tuple(one.shape) for one in projection[1:4]) != expected:
            raise BundleError("the output projection has sizes that do not belong together")
        self._projection, self._dtype, self._library = projection, dtype, library
        self._panels = library.pack(projection.weight.to(dtype))
        self._bias = projection.bias.new_full(
            (len(self._panels.values) * library.panel_width,), torch.finfo(torch.float32).min
        )
        self._bias[:classes] = projection.bias

    @staticmethod
    def fits(projection: OutputProjection, dtype: torch.dtype, library: KernelLibrary) -> bool:
        """Whether there is a kernel for the projection."""
        even = projection.weight.shape[1] % 2 == 0
        return projection.softcap is None and even and library.multiplies(dtype)

    def terms(
        self, hidden: Tensor, labels: Tensor, *, with_ranks_and_entropies: bool = False
    ) -> tuple[Tensor, ...]:
        """See `seqloss.loss.head.LossHead.terms`."""
        weight, bias, mean_weight, mean_bias, _ = self._projection
        # The kernels read as much memory as they are told; the states are a stranger's graph's.
        is_here = hidden.device.type == "cpu" and hidden.dtype == torch.float32
        if not is_here or hidden.shape != (len(labels), self._panels.inner):
            raise BundleError("a graph ends with states that are not the output projection's")
        if len(labels) and not (labels.min() >= 0 and labels.max() < len(weight)):
            raise ValueError("there are labels that are no classes. This is a bug.")
        hidden, labels = hidden.contiguous(), labels.contiguous()
        target_logit = self._library.label_logits(hidden, weight, bias, labels)
        # As a kernel, and not as Torch's product, whose rows depend on how many there are.
        mean_logit = self._library.label_logits(
            hidden, mean_weight[None], mean_bias[None], torch.zeros_like(labels)
        )
        tokens = HeadTokens(hidden.to(self._dtype), target_logit, labels)
        if not with_ranks_and_entropies:
            nll = self._library.nlls(tokens, self._panels, self._bias)
            self._make_finite(nll, tokens)
            return -nll, mean_logit - (target_logit + nll)
        sums = self._library.class_sums(tokens, self._panels, self._bias)
        nll = sums.nlls
        about_largest = self._make_finite(nll, tokens)
        entropy = self._entropy(sums, tokens, about_largest)
        return -nll, mean_logit - (target_logit + nll), sums.ranks, entropy

    def _make_finite(self, nlls: Tensor, tokens: HeadTokens) -> Tensor:
        """Corrects, in place, those for which exp did not fit into a float32: beyond 88 nats.

        The other classes are summed up again relative to the largest of them, and not to the
        label's logit, by the same kernel, so that here too no token's bits depend on another's.

        Returns:
            About the largest logit of each token. Shape: (K,).
        """
        about_largest = tokens.label_logits + nlls
        (rows,) = torch.nonzero(nlls == torch.inf, as_tuple=True)
        if len(rows):
            behind = HeadTokens(*(of[rows] for of in tokens))
            largest = behind.label_logits
            # The first time it is as coarse as a float of the label's logit is.
            for _ in range(2):
                sums = self._sums_from(largest, behind)
                largest = largest + sums.leads
            sums = self._sums_from(largest, behind)
            lead = largest.double() - behind.label_logits.double()
            # So far behind, a label adds nothing to the sum.
            nlls[rows] = (sums.totals.log() + lead).float()
            about_largest[rows] = largest
        return about_largest

    def _sums_from(self, zero: Tensor, tokens: HeadTokens) -> ClassSums:
        """Of logits relative to these, and not to the label's."""
        return self._library.class_sums(
            tokens._replace(label_logits=zero), self._panels, self._bias
        )

    def _entropy(self, sums: ClassSums, tokens: HeadTokens, about_largest: Tensor) -> Tensor:
        """Of the whole softmax: is it the label, and if not which other class; in float32.

        That of the others is `log total - weighted / total`, two numbers of about the size of how
        far they are ahead; where that is much they are summed up again, with about the largest of
        them in the place of the label's logit.
        """
        nll = sums.nlls.double()
        others = _entropy_of_others(sums)
        (rows,) = torch.nonzero(~(nll < _LARGEST_LEAD), as_tuple=True)
        if len(rows):
            unlikely = HeadTokens(*(of[rows] for of in tokens))
            others[rows] = _entropy_of_others(self._sums_from(about_largest[rows], unlikely))
        nll_other = softplus(-sums.totals.log())
        # Without any other class, or one that a float32 can tell from 0, there is no doubt.
        is_one = sums.totals > 0
        others = torch.where(is_one, others, 0.0).clamp(min=0)
        surprise = torch.where(is_one, nll_other, 0.0)
        return ((-nll).exp() * nll + (-nll_other).exp() * (surprise + others)).float()


def _entropy_of_others(sums: ClassSums) -> Tensor:
    """Of the classes but the label, among themselves."""
    return sums.totals.log() - sums.weighted / sums.totals
