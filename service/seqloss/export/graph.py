"""The loss graph: a transformers body with our head on top, captured with `torch.export`."""

from __future__ import annotations

import io
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from seqloss.bundle.graph_archive import distil
from seqloss.errors import BundleError, CheckpointError
from seqloss.loss.head import VOCABULARY_BLOCK, OutputProjection, block_terms, output_projection

# Every axis is dynamic. Sizes of the example are at least 2 and differ: torch.export specialises
# on 0 and 1, and takes equal sizes for one.
_DYNAMIC = ({0: Dim.AUTO, 1: Dim.AUTO}, {0: Dim.AUTO, 1: Dim.AUTO}, {0: Dim.AUTO})
_DYNAMIC_SHAPES = (*_DYNAMIC, {0: Dim.AUTO, 1: Dim.AUTO}, {0: Dim.AUTO}, {0: Dim.AUTO})
_NUM_SYMBOLS = 6  # U, S, B, T, K, and K again for the labels, which the engine makes as long


class LossGraph(nn.Module):
    """Encoder once per unique source, decoder per target, terms per counted token."""

    def __init__(
        self, model: Any, excluded_classes: list[int], *, with_ranks_and_entropies: bool
    ) -> None:
        super().__init__()
        self.encoder = model.get_encoder()
        self.decoder = model.get_decoder()
        bias = getattr(model, "final_logits_bias", None)
        projection = output_projection(
            model.get_output_embeddings().weight,
            None if bias is None else bias[0],
            excluded_classes,
        )
        self.output_bias: Tensor
        self.output_mean_weight: Tensor
        self.output_mean_bias: Tensor
        self.output_weight = nn.Parameter(projection.weight, requires_grad=False)
        self.register_buffer("output_bias", projection.bias)
        self.register_buffer("output_mean_weight", projection.mean_weight)
        self.register_buffer("output_mean_bias", projection.mean_bias)
        self._with_ranks_and_entropies = with_ranks_and_entropies
        # Buffers that transformers makes anew at load, such as sinusoids, are weights of a bundle.
        for module in self.modules():
            module._non_persistent_buffers_set.clear()

    def forward(
        self,
        source_ids: Tensor,
        source_mask: Tensor,
        source_row: Tensor,
        decoder_input_ids: Tensor,
        token_index: Tensor,
        labels: Tensor,
    ) -> tuple[Tensor, ...]:
        """See `seqloss.engines.layout.PaddedInputs` and `seqloss.records.TokenTerms`."""
        encoded = self.encoder(
            input_ids=source_ids, attention_mask=source_mask
        ).last_hidden_state  # (U, S, D)
        decoded = self.decoder(
            input_ids=decoder_input_ids,
            encoder_hidden_states=encoded.index_select(0, source_row),
            encoder_attention_mask=source_mask.index_select(0, source_row),
            use_cache=False,
        ).last_hidden_state  # (B, T, D)
        # The causal mask keeps a target's padding, which follows it, away from its own tokens.
        hidden = decoded.flatten(0, 1).index_select(0, token_index)  # (K, D)
        projection = OutputProjection(
            self.output_weight, self.output_bias, self.output_mean_weight, self.output_mean_bias
        )
        return block_terms(
            hidden, projection, labels, self._with_ranks_and_entropies, VOCABULARY_BLOCK
        )


def capture(graph: LossGraph) -> bytes:
    """The graph as a `torch.export` archive without weights.

    Raises:
        CheckpointError: a size that must be free was fixed by the model's code, or the graph uses
            an operator that bundles may not.
    """
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.export.export(
            graph.eval(), _example_inputs(), dynamic_shapes=_DYNAMIC_SHAPES, strict=False
        )
    free = len(program.range_constraints)
    if free != _NUM_SYMBOLS:
        raise CheckpointError(
            f"the model's code fixes sizes: {free} of {_NUM_SYMBOLS} remained free when traced"
        )
    state = program.state_dict
    for name, tensor in state.items():
        meta = tensor.detach().to("meta")
        state[name] = nn.Parameter(meta, False) if isinstance(tensor, nn.Parameter) else meta
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    try:
        return distil(buffer.getvalue())
    except BundleError as error:
        raise CheckpointError(
            "the model's graph holds what bundles may not (see seqloss/bundle/graph_policy.py)",
            error.faults,
        ) from error


def weights_of(graph: LossGraph) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each tensor once, and the names that share one: (stored tensors, alias to stored name)."""
    stored: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    name_of: dict[tuple[int, torch.Size, tuple[int, ...]], str] = {}
    for name, tensor in graph.state_dict().items():
        identity = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if identity in name_of and tensor.numel():
            aliases[name] = name_of[identity]
        else:
            name_of[identity] = name
            stored[name] = tensor.contiguous()
    return stored, aliases


def _example_inputs() -> tuple[Tensor, ...]:
    num_sources, source_length, num_targets, target_length, num_tokens = 3, 7, 5, 6, 11
    return (
        torch.zeros(num_sources, source_length, dtype=torch.int64),
        torch.ones(num_sources, source_length, dtype=torch.int64),
        torch.zeros(num_targets, dtype=torch.int64),
        torch.zeros(num_targets, target_length, dtype=torch.int64),
        torch.arange(num_tokens),
        torch.zeros(num_tokens, dtype=torch.int64),
    )
