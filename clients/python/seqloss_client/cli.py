"""The command `seqloss-client`: finds a command's module, and calls it."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from seqloss_client import SeqlossError, __version__

# Each module has `add_arguments(parser)` and `run(arguments) -> int`. Only that of the command that
# is called is imported: some want more than the client itself.
_COMMANDS = {
    "score": ("seqloss_client.corpus.score", "a number for every pair of a corpus"),
    "filter": ("seqloss_client.filtering", "keep the pairs of a corpus that are worth it"),
    "rerank": ("seqloss_client.reranking", "order the candidates of every source"),
    "report": ("seqloss_client.report", "a page about the scores of a corpus"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns:
        The exit status: 0 done, 1 it could not be done, 2 a wrong command line, 130 interrupted;
        commands may have others.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    parsed = _parser(given[0] if given else "").parse_args(given)
    try:
        status: int = importlib.import_module(_COMMANDS[parsed.command][0]).run(parsed)
    except SeqlossError as error:
        print(f"seqloss-client {parsed.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"seqloss-client {parsed.command}: interrupted", file=sys.stderr)
        return 130
    return status


def _parser(chosen: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="seqloss-client", description="Losses of an encoder-decoder model, for whole corpora."
    )
    parser.add_argument("--version", action="version", version=f"seqloss-client {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, about) in _COMMANDS.items():
        command = commands.add_parser(name, help=about, description=about)
        if name == chosen:
            importlib.import_module(module).add_arguments(command)
    return parser


if __name__ == "__main__":
    sys.exit(main())
