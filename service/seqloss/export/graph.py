"""The model up to its output layer, captured with `torch.export`."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind
from transformers.modeling_outputs import BaseModelOutput

from seqloss.bundle.graph_archive import distil
from seqloss.errors import BundleError, CheckpointError
from seqloss.export.families import FAMILIES
from seqloss.loss.head import OutputProjection, output_projection
from seqloss.model.transformer import PackedTransformer

_DYNAMIC_SHAPES = (
    {0: Dim.AUTO, 1: Dim.AUTO},  # source_ids
    {0: Dim.AUTO, 1: Dim.AUTO},  # source_mask
    {0: Dim.AUTO},  # source_row
    {0: Dim.AUTO, 1: Dim.AUTO},  # decoder_input_ids
    {0: Dim.AUTO},  # token_index
)


class Body(nn.Module):
    """Encoder once per unique source, decoder per target, hidden states of counted tokens."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self._family = FAMILIES[model.config.model_type]
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
    ) -> Tensor:
        """What the output layer is given, of counted tokens only. Shape: (K, D), float32.

        For the inputs see `seqloss.engines.layout.PaddedInputs`.
        """
        encoder = self.model.get_encoder()
        encoded = encoder(
            **ids_or_embeddings(encoder, source_ids, embed=self._family.embeds_ids),
            attention_mask=source_mask,
            return_dict=True,
        ).last_hidden_state  # (U, S, D)
        decoded = self._decoded(
            encoded.index_select(0, source_row),
            source_mask.index_select(0, source_row),
            decoder_input_ids,
        )
        # The causal mask keeps a target's padding, which follows it, away from its own tokens.
        return decoded.flatten(0, 1).index_select(0, token_index).float()  # (K, D)

    def _decoded(self, encoded: Tensor, mask: Tensor, decoder_input_ids: Tensor) -> Tensor:
        """What the model hands to its output layer. Shape: (B, T, D).

        Families scale or project between decoder and output layer.  All of that is taken as it is;
        the logits themselves are dead code, which `capture` removes.
        """
        seen: list[Tensor] = []
        layer = self._family.output_layer(self.model)
        hook = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        decoder = self.model.get_decoder()
        try:
            self.model(
                encoder_outputs=BaseModelOutput(last_hidden_state=encoded),
                attention_mask=mask,
                **ids_or_embeddings(
                    decoder, decoder_input_ids, "decoder_", embed=self._family.embeds_ids
                ),
                **({"input_ids": decoder_input_ids} if self._family.wants_source_ids else {}),
                # Without it some families take ids that equal the pad id for padding.
                decoder_attention_mask=torch.ones_like(decoder_input_ids),
                use_cache=False,
                return_dict=True,
            )
        finally:
            hook.remove()
        (hidden,) = seen
        return hidden


def ids_or_embeddings(part: Any, ids: Tensor, prefix: str = "", *, embed: bool) -> dict[str, Any]:
    """The arguments by which a body is given its ids."""
    if embed:
        return {f"{prefix}inputs_embeds": embeddings_of(part)(ids)}
    return {f"{prefix}input_ids": ids}


def embeddings_of(part: Any) -> Any:
    """The table of an encoder or a decoder."""
    return part.embed_tokens if hasattr(part, "embed_tokens") else part.get_input_embeddings()


class Captured(NamedTuple):
    """A graph without weights, and the weights that it reads, by their names."""

    archive: bytes
    state: dict[str, Tensor]


def capture(body: Body, source_multiple: int = 1) -> Captured:
    """The graph as a `torch.export` archive, and its weights.

    Args:
        body: in the precision that its weights have.
        source_multiple: source lengths are multiples of this, and at least two of them.

    Raises:
        CheckpointError: a size that must be free was fixed by the model's code, or the graph uses
            an operator that bundles may not.
    """
    return _captured(traced(body, source_multiple))


def capture_packed(model: PackedTransformer) -> Captured:
    """The graph of a native model, in the precision that its weights have; see `capture`."""
    inputs = _packed_example_inputs()
    return _captured(_traced(model, inputs, [{0: Dim.AUTO}] * len(inputs)))


def _captured(program: ExportedProgram) -> Captured:
    state = _state(program)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    try:
        return Captured(distil(buffer.getvalue()), state)
    except BundleError as error:
        raise CheckpointError(
            "the model's graph holds what bundles may not (see seqloss/bundle/graph_policy.py)",
            error.faults,
        ) from error


def traced(
    module: nn.Module, source_multiple: int = 1, *, with_head: bool = False
) -> ExportedProgram:
    """The module as a program of operators, with all sizes free.

    Args:
        module: takes what `Body` takes.
        source_multiple: source lengths are multiples of this, and at least two of them.
        with_head: whether it takes labels, and where all terms are wanted, too.

    Raises:
        CheckpointError: a size that must be free was fixed by the model's code.
    """
    inputs = _example_inputs(source_multiple)
    if with_head:
        return _traced(
            module, (*inputs, *_example_labels()), [*_DYNAMIC_SHAPES, *[{0: Dim.AUTO}] * 2]
        )
    return _traced(module, inputs, _DYNAMIC_SHAPES)


def _traced(
    module: nn.Module, inputs: tuple[Tensor, ...], dynamic_shapes: Sequence[dict[int, Any]]
) -> ExportedProgram:
    one_hot = patch.object(torch.nn.functional, "one_hot", _one_hot)
    with warnings.catch_warnings(), torch.no_grad(), one_hot:
        warnings.simplefilter("ignore")
        program = torch.export.export(
            module.eval(), inputs, dynamic_shapes=tuple(dynamic_shapes), strict=False
        )
    _refuse_fixed_sizes(program)
    return program


def _one_hot(ids: Tensor, num_classes: int) -> Tensor:
    """As Torch's, whose operator fixes a number of classes that follows from an input's size."""
    classes = torch.arange(num_classes, device=ids.device)
    return (ids.unsqueeze(-1) == classes).to(torch.int64)


def _refuse_fixed_sizes(program: ExportedProgram) -> None:
    fixed = [
        f"{node.name} has the fixed shape {tuple(map(str, node.meta['val'].shape))}"
        for node in program.graph.nodes
        if node.op == "placeholder"
        and node.name in program.graph_signature.user_inputs
        and any(isinstance(size, int) for size in node.meta["val"].shape)
    ]
    if fixed:
        raise CheckpointError("the model's code fixes sizes that must be free", fixed)


def _state(program: ExportedProgram) -> dict[str, Tensor]:
    """Takes the weights out of the program, and what it does not read away from it.

    Constants that the model's code made along the way become weights too: an archive that holds
    tensors of its own is refused.
    """
    program.graph.eliminate_dead_code()
    state: dict[str, Tensor] = {}
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    kept = []
    for spec in program.graph_signature.input_specs:
        name = spec.target
        if spec.kind == InputKind.USER_INPUT or name is None:
            kept.append(spec)
        elif not nodes[spec.arg.name].users:
            program.graph.erase_node(nodes[spec.arg.name])
        else:
            constants = program.constants if name in program.constants else program.state_dict
            state[name] = constants[name].detach()
            if spec.kind != InputKind.PARAMETER:
                spec.kind, spec.persistent = InputKind.BUFFER, True
            kept.append(spec)
    program.graph_signature.input_specs = kept
    program.constants.clear()
    program.state_dict.clear()
    for spec in kept:
        if spec.target is not None:
            meta = state[spec.target].to("meta")
            is_parameter = spec.kind == InputKind.PARAMETER
            program.state_dict[spec.target] = nn.Parameter(meta, False) if is_parameter else meta
    program.graph_module.recompile()
    return state


def distinct(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each tensor once, and the names that share one: (stored tensors, alias to stored name)."""
    stored: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    name_of: dict[tuple[int, torch.Size, tuple[int, ...]], str] = {}
    for name, tensor in state.items():
        identity = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if identity in name_of and tensor.numel():
            aliases[name] = name_of[identity]
        else:
            name_of[identity] = name
            stored[name] = tensor.contiguous()
    return stored, aliases


def projection_of(model: Any, excluded_classes: list[int]) -> OutputProjection:
    """The model's output layer, for the head."""
    layer = FAMILIES[model.config.model_type].output_layer(model)
    biases = [
        bias.detach().float().flatten()
        for bias in (getattr(model, "final_logits_bias", None), getattr(layer, "bias", None))
        if bias is not None
    ]
    bias = torch.stack(biases).sum(0) if biases else None
    projection = output_projection(layer.weight.detach(), bias, excluded_classes)
    return projection._replace(softcap=softcap_of(model))


def softcap_of(model: Any) -> float | None:
    """The bound that the model squashes its logits to, where it does."""
    softcap: float | None = getattr(
        model.config.get_text_config(True), "final_logit_softcapping", None
    )
    return softcap


def _example_inputs(source_multiple: int) -> tuple[Tensor, ...]:
    """Sizes are at least 2 and differ: torch.export specialises on 0 and 1, and equates equals."""
    num_sources, source_length, num_targets, target_length, num_tokens = 3, 7, 5, 6, 11
    source_length *= source_multiple
    return (
        torch.zeros(num_sources, source_length, dtype=torch.int64),
        torch.ones(num_sources, source_length, dtype=torch.int64),
        torch.zeros(num_targets, dtype=torch.int64),
        torch.zeros(num_targets, target_length, dtype=torch.int64),
        torch.arange(num_tokens),
    )


def _example_labels() -> tuple[Tensor, Tensor]:
    """What a head takes beside: labels of the tokens, and of which ones all terms are wanted."""
    return torch.zeros(11, dtype=torch.int64), torch.arange(9)


def _packed_example_inputs() -> tuple[Tensor, ...]:
    """Of as many dimensions as `seqloss.engines.layout.PackedInputs`, likewise without equals."""
    num_source_tokens, num_sources, num_target_tokens, num_targets, num_tokens = 23, 3, 29, 5, 11
    return (
        torch.zeros(num_source_tokens, dtype=torch.int64),
        torch.zeros(num_source_tokens, dtype=torch.int64),
        torch.zeros(num_sources, dtype=torch.int64),
        torch.zeros(num_sources, dtype=torch.int64),
        torch.zeros(num_targets, dtype=torch.int64),
        torch.zeros(num_target_tokens, dtype=torch.int64),
        torch.zeros(num_target_tokens, dtype=torch.int64),
        torch.zeros(num_targets, dtype=torch.int64),
        torch.zeros(num_targets, dtype=torch.int64),
        torch.arange(num_tokens),
    )
