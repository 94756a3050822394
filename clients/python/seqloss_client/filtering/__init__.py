"""Filters a parallel corpus by dual conditional cross-entropy: `seqloss-client filter`.

Data flows one way: `losses` (files of scores, or services) -> `formula` -> `ranking` (DuckDB) ->
`copying` (the pairs that are kept).
"""

from seqloss_client.filtering.command import add_arguments, run
from seqloss_client.filtering.formula import adequacy, domain_weight
from seqloss_client.filtering.losses import Direction

__all__ = ["Direction", "add_arguments", "adequacy", "domain_weight", "run"]
