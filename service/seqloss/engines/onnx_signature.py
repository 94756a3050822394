"""What a loss graph takes and gives, by name and in order."""

from __future__ import annotations

LOSS_INPUTS = (
    "source_ids",
    "source_mask",
    "source_row",
    "decoder_input_ids",
    "token_index",
    "labels",
    "full_index",
)
"""As `engines.layout.PaddedInputs` has them, and where ranks and entropies are wanted."""

LOSS_OUTPUTS = ("target_logprob", "mean_logprob", "rank", "entropy")
"""As `records.TokenTerms` has them; the last two are as long as `full_index`."""
