"""A small model that is really trained, and the recipe that trained it.

It localises English dates, times, numbers, amounts and quantities into German, French and Spanish,
as Unicode CLDR has them.
"""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
"""The trained checkpoint: config.json, model.safetensors, tokenizer.json, LICENSE.unicode."""
