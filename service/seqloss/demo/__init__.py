"""Two small models that are really trained, and the recipe that trained them.

One localises English dates, times, numbers, amounts and quantities into German, French and Spanish,
as Unicode CLDR has them; the other one does it backward.
"""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
"""The trained checkpoint: config.json, model.safetensors, tokenizer.json, LICENSE.unicode."""

BACKWARD_CHECKPOINT = Path(__file__).parent / "backward_checkpoint"
"""The same of the model that reads German, French and Spanish, and writes English."""
