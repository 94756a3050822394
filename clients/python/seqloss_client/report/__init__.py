"""One page about the losses of a corpus: `seqloss-client report`.

Data flows one way: `counting` (as losses pass by) -> `pictures` (Matplotlib) -> `page` (HTML).
"""

from seqloss_client.report.command import add_arguments, run

__all__ = ["add_arguments", "run"]
