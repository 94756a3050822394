"""`seqloss serve` and `seqloss export`: parse, call, print."""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from seqloss import __version__
from seqloss.errors import ConfigurationError, SeqlossError
from seqloss.settings import Settings, load_settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns:
        The exit status: 0 done, 1 failed while serving, 2 refused.  A signal that ends the service
        is raised again once it has drained, so that its supervisor sees it.
    """
    options = _parser().parse_args(arguments)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    try:
        status: int = options.run(options)
    except SeqlossError as error:
        print(f"seqloss {options.command}: {error}", file=sys.stderr)
        return 2
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="seqloss", description=__doc__)
    parser.add_argument("--version", action="version", version=f"seqloss {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", help="answer POST /loss for one or more bundles")
    serve.add_argument(
        "bundles",
        nargs="+",
        metavar="[NAME=]BUNDLE",
        help="a bundle's folder; without a name its model is called as the folder is",
    )
    serve.add_argument("--host", help="where to listen (default: 127.0.0.1)")
    serve.add_argument("--port", help="(default: 8000)")
    serve.add_argument("--device", help="auto, cpu or cuda:N (default: auto)")
    serve.add_argument("--max-batch-tokens", help="padded tokens of a batch (default: 4096)")
    serve.set_defaults(run=_serve)

    export = commands.add_parser("export", help="make a bundle of a Hugging Face checkpoint")
    export.add_argument("checkpoint", help="a local folder or a hub name")
    export.add_argument("--output", type=Path, required=True, help="the bundle's folder")
    export.add_argument("--engine", choices=["torch"], default="torch")
    export.add_argument("--precision", choices=["float32"], default="float32")
    export.add_argument(
        "--exclude-classes",
        type=_range,
        nargs="+",
        default=[],
        metavar="FIRST[-LAST]",
        help="classes to keep out of the softmax, such as ids that are sources only",
    )
    export.add_argument("--force", action="store_true", help="replace a bundle at the output")
    export.set_defaults(run=_export)
    return parser


def _range(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is neither FIRST nor FIRST-LAST")
    first, last = match.groups()
    return int(first), int(last or first)


def _serve(options: argparse.Namespace) -> int:
    from seqloss.bundle.reader import open_bundle
    from seqloss.http.server import serve

    settings = _settings(options)
    bundles = {name: open_bundle(path) for name, path in _named(options.bundles).items()}
    return 0 if serve(bundles, settings) else 1


def _settings(options: argparse.Namespace) -> Settings:
    names = ("host", "port", "device", "max_batch_tokens")
    return load_settings(
        **{name: value for name in names if (value := getattr(options, name)) is not None}
    )


def _named(bundles: Sequence[str]) -> dict[str, Path]:
    named: dict[str, Path] = {}
    for text in bundles:
        name, found, path = text.partition("=")
        folder = Path(path if found else text)
        name = name if found else folder.resolve().name
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", name):
            raise ConfigurationError(
                f"{name!r} cannot name a model: give NAME=BUNDLE, a name of letters, digits, '.', "
                "'_' and '-'"
            )
        if name in named:
            raise ConfigurationError(f"two bundles are named {name!r}; give NAME=BUNDLE")
        named[name] = folder
    return named


def _export(options: argparse.Namespace) -> int:
    try:
        from seqloss.export.exporter import ExportOptions, export_checkpoint
    except ImportError as error:
        raise ConfigurationError(
            f"exporting needs {error.name}: pip install 'seqloss[export]'"
        ) from error

    manifest = export_checkpoint(
        options.checkpoint,
        options.output,
        ExportOptions(
            engine=options.engine,
            precision=options.precision,
            excluded_classes=tuple(options.exclude_classes),
            force=options.force,
        ),
    )
    graph = manifest.graphs[0]
    print(
        f"{options.output}: {manifest.family}, {graph.engine} in {graph.precision}, at most "
        f"{graph.max_error:.1e} nats per token from transformers ({graph.mean_error:.1e} on "
        f"average)\nserve it: seqloss serve {options.output}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
