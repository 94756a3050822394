"""Writes the dashboards: `python deploy/grafana/build.py [FOLDER]`.

It needs what tests/deploy/dashboards-requirements.txt lists. The files are for Grafana 11.6, whose
schema the pinned library has; later versions read them too.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder
from loss import LOSS
from panels import Board, build
from service import SERVICE

_FOLDER = Path(__file__).parent / "dashboards"
_BOARDS: dict[str, Board] = {"service": SERVICE, "loss": LOSS}


def main(folder: Path) -> None:
    """Writes a file for each dashboard."""
    for name, board in _BOARDS.items():
        text = json.dumps(build(board), cls=JSONEncoder, indent=2, sort_keys=True)
        (folder / f"{name}.json").write_text(text + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else _FOLDER)
