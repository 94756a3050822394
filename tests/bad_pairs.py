"""Pairs that cannot be scored, by what is wrong with them; for the fake model's limits."""

from __future__ import annotations

from typing import Any

from fakes import MAX_TOKENS, VOCABULARY_SIZE

TOO_MANY = [4] * (MAX_TOKENS + 1)

# Each pair code: a body of one bad pair between two good ones, and where the fault lies.
BAD_PAIRS: dict[str, tuple[dict[str, Any], str, list[str | int]]] = {
    "empty source": ({"source_ids": [[3], [], [4]]}, "empty_source", ["source_ids", 1]),
    "source masked away": (
        {"source_ids": [[3], [4], [5]], "source_mask": [[1], [0], [1]]},
        "empty_source",
        ["source_ids", 1],
    ),
    "empty target": ({"target_ids": [[5], [], [6]]}, "empty_target", ["target_ids", 1]),
    "target of nothing but ignored": (
        {"target_ids": [[5], [-100, -100], [6]]},
        "empty_target",
        ["target_ids", 1],
    ),
    "target masked away": (
        {"target_ids": [[5], [7], [6]], "target_mask": [[1], [0], [1]]},
        "empty_target",
        ["target_ids", 1],
    ),
    "target all prefix": (
        {"target_ids": [[5, 6], [7], [6, 7]], "prefix_length": 1},
        "empty_target",
        ["target_ids", 1],
    ),
    "source id too large": (
        {"source_ids": [[3], [4, VOCABULARY_SIZE], [5]]},
        "token_out_of_range",
        ["source_ids", 1, 1],
    ),
    "source id negative": (
        {"source_ids": [[3], [-1], [5]]},
        "token_out_of_range",
        ["source_ids", 1, 0],
    ),
    "source id ignored": (
        {"source_ids": [[3], [-100], [5]]},
        "token_out_of_range",
        ["source_ids", 1, 0],
    ),
    "target id too large": (
        {"target_ids": [[5], [6, VOCABULARY_SIZE, 7], [8]]},
        "token_out_of_range",
        ["target_ids", 1, 1],
    ),
    "target id negative": (
        {"target_ids": [[5], [-1], [8]]},
        "token_out_of_range",
        ["target_ids", 1, 0],
    ),
    "fed and not counted": (
        {"target_ids": [[5], [99, 6], [8]], "target_mask": [[1], [0, 1], [1]]},
        "token_out_of_range",
        ["target_ids", 1, 0],
    ),
    "beyond 64 bits": (
        {"target_ids": [[5], [2**70], [8]]},
        "token_out_of_range",
        ["target_ids", 1, 0],
    ),
    "start id": (
        {"decoder_start_token_id": [1, 50, 1]},
        "token_out_of_range",
        ["decoder_start_token_id", 1],
    ),
    "decoder input": (
        {"target_ids": [[5], [6, 7], [8]], "decoder_input_ids": [[1], [1, 77], [1]]},
        "token_out_of_range",
        ["decoder_input_ids", 1, 1],
    ),
    "source too long": (
        {"source_ids": [[3], TOO_MANY, [4]]},
        "source_too_long",
        ["source_ids", 1],
    ),
    "target too long": (
        {"target_ids": [[3], TOO_MANY, [4]]},
        "target_too_long",
        ["target_ids", 1],
    ),
    "hole in a source mask": (
        {"source_ids": [[3], [4, 5, 6], [7]], "source_mask": [[1], [1, 0, 1], [1]]},
        "source_mask_not_trailing",
        ["source_mask", 1],
    ),
    "masked start of a source": (
        {"source_ids": [[3], [4, 5], [7]], "attention_mask": [[1], [0, 1], [1]]},
        "source_mask_not_trailing",
        ["source_mask", 1],
    ),
}
