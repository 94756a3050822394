"""What each family of transformers needs beyond its own code to be captured as a graph.

A family that is not named here may well export; it is refused until a test compares its losses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple


def _max_position_embeddings(config: Any) -> tuple[int | None, int | None]:
    longest = config.max_position_embeddings
    return longest, longest


def _unbounded(_: Any) -> tuple[int | None, int | None]:
    """Relative positions know no longest input."""
    return None, None


def _bigbird_positions(config: Any) -> tuple[int, int]:
    """Up to this source length transformers itself uses full attention, which is what is captured.

    Beyond, its sparse attention draws random blocks.
    """
    longest = config.max_position_embeddings
    if config.attention_type == "original_full":
        return longest, longest
    return min(longest, (5 + 2 * config.num_random_blocks) * config.block_size), longest


def _parts_positions(config: Any) -> tuple[int | None, int | None]:
    """An encoder and a decoder with configurations of their own."""

    def longest(part: Any) -> int | None:
        positions: int | None = getattr(part, "max_position_embeddings", None)
        # RoBERTa counts positions from behind the pad id on.
        reserved = part.pad_token_id + 1 if "roberta" in part.model_type else 0
        return None if positions is None else positions - reserved

    return longest(config.encoder), longest(config.decoder)


def _lm_head(model: Any) -> Any:
    return model.get_output_embeddings()


def _full_attention(model: Any) -> None:
    model.get_encoder().set_attention_type("original_full")


def _long_tables(model: Any) -> None:
    """Sinusoids for all positions: the table grows at run time, which a graph cannot do."""
    for part in (model.get_encoder(), model.get_decoder()):
        table = part.embed_positions
        rows = model.config.max_position_embeddings + table.padding_idx + 1
        make = table.make_weights if hasattr(table, "make_weights") else table.make_weight
        make(rows, table.embedding_dim, table.padding_idx)


def _sequential_positions(model: Any) -> None:
    """FSMT counts positions by `ids != pad`; here all ids count."""
    _long_tables(model)

    def make_positions(ids: Any, padding_idx: int) -> Any:
        return ids.new_ones(ids.shape).cumsum(1) + padding_idx

    for part in (model.get_encoder(), model.get_decoder()):
        part.embed_positions.make_positions = make_positions


@dataclass(frozen=True, slots=True)
class Family:
    """How a family differs from BART.

    Attributes:
        name: as people write it.
        embeds_ids: whether ids are embedded before they are handed to the body, which then has no
            ids to derive positions from: M2M100 and RoBERTa skip pad ids when they count.
        wants_source_ids: whether the body must see source ids beside their encoding: without them
            FSMT forgets its causal mask.
        widens: whether outputs of 16-bit layers are widened to float32 at once, since its own
            attention code cannot mix the two.
        safe_in_float16: whether activations are known to stay below 65,504.
        max_positions: the longest source and target by a configuration.
        output_layer: finds the linear layer whose outputs are the logits.
        prepare: changes a loaded model before it is captured.
        attention: transformers' implementation of it; None for the fastest that the family has.
        source_multiple: source lengths that its block attention was traced with are multiples of
            this, and at least two of them, by a configuration.
    """

    name: str
    embeds_ids: bool = False
    wants_source_ids: bool = False
    widens: bool = False
    safe_in_float16: bool = True
    max_positions: Callable[[Any], tuple[int | None, int | None]] = _max_position_embeddings
    output_layer: Callable[[Any], Any] = _lm_head
    prepare: Callable[[Any], None] = lambda _: None
    attention: str | None = None
    source_multiple: Callable[[Any], int] = lambda _: 1


def _t5(name: str) -> Family:
    return Family(name, safe_in_float16=False, max_positions=_unbounded)


# By transformers' `model_type`.
FAMILIES: dict[str, Family] = {
    "bart": Family("BART"),
    "bigbird_pegasus": Family(
        "BigBird-Pegasus",
        widens=True,
        safe_in_float16=False,
        max_positions=_bigbird_positions,
        prepare=_full_attention,
    ),
    "blenderbot": Family("Blenderbot"),
    "blenderbot-small": Family("Blenderbot-small"),
    "encoder-decoder": Family(
        "EncoderDecoderModel", embeds_ids=True, max_positions=_parts_positions
    ),
    "fsmt": Family(
        "FSMT",
        wants_source_ids=True,
        widens=True,
        output_layer=lambda model: model.get_decoder().output_projection,
        prepare=_sequential_positions,
    ),
    "longt5": Family(
        "LongT5",
        widens=True,
        safe_in_float16=False,
        max_positions=_unbounded,
        source_multiple=lambda config: config.local_radius + 1,
    ),
    "m2m_100": Family("M2M100, NLLB", embeds_ids=True, prepare=_long_tables),
    "marian": Family("Marian"),
    "mbart": Family("mBART, mBART-50"),
    "mt5": _t5("mT5"),
    "mvp": Family("MVP", widens=True),
    "pegasus": Family("Pegasus", safe_in_float16=False),
    "plbart": Family("PLBart"),
    "t5": _t5("T5, Flan-T5"),
    "t5gemma": Family(
        "T5Gemma",
        widens=True,
        safe_in_float16=False,
        max_positions=_parts_positions,
        attention="eager",  # the others have no softcap
    ),
    "umt5": _t5("UMT5"),
}

_ROUTED = "its experts take a limited share of each batch, so that a pair's loss depends on others"


class Refusal(NamedTuple):
    """A family that cannot be scored, by the name that people write, and why."""

    name: str
    reason: str


REFUSED: dict[str, Refusal] = {
    "led": Refusal(
        "LED", "its windowed attention takes sizes out of tensors, which torch.export cannot follow"
    ),
    "nllb-moe": Refusal("NLLB-MoE", _ROUTED),
    "prophetnet": Refusal(
        "ProphetNet", "its logits change with the number of tokens that follow, padding included"
    ),
    "switch_transformers": Refusal("Switch Transformers", _ROUTED),
}
