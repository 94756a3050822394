"""The command `seqloss`: parse, call, print."""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import get_args

from seqloss import __version__, logs, process
from seqloss.bundle.manifest import EngineName, Manifest, Precision
from seqloss.errors import ConfigurationError, SeqlossError
from seqloss.settings import Settings, load_settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns:
        The exit status: 0 done, 1 failed while serving or not verified, 2 refused.  A signal that
        ends the service is raised again once it has drained, so that its supervisor sees it.
    """
    options = _parser().parse_args(arguments)
    logs.configure("text")
    try:
        status: int = options.run(options)
    except SeqlossError as error:
        print(f"seqloss {options.command}: {error}", file=sys.stderr)
        return 2
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="seqloss", description="The loss of an encoder-decoder model as a service."
    )
    parser.add_argument("--version", action="version", version=f"seqloss {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_serve(commands.add_parser("serve", help="answer POST /loss for one or more bundles"))
    _add_export(commands.add_parser("export", help="make a bundle of a Hugging Face checkpoint"))
    _add_import(commands.add_parser("import-onnx", help="make a bundle of an ONNX encoder-decoder"))
    _add_verify(commands.add_parser("verify", help="hold a bundle against a checkpoint"))
    _add_inspect(commands.add_parser("inspect", help="say what is in a bundle"))
    _add_ray_score(
        commands.add_parser("ray-score", help="score a dataset of Parquet or JSON lines on Ray")
    )
    return parser


def _add_serve(serve: argparse.ArgumentParser) -> None:
    serve.add_argument(
        "bundles",
        nargs="+",
        metavar="[NAME=]BUNDLE",
        help="a bundle's folder; without a name its model is called as the folder is",
    )
    serve.add_argument("--host", help="where to listen (default: 127.0.0.1)")
    serve.add_argument("--port", help="(default: 8000)")
    serve.add_argument("--device", help="auto, cpu or cuda:N (default: auto)")
    serve.add_argument(
        "--engine",
        help="auto, torch or onnx (default: auto, the first that the bundle holds and that is "
        "installed)",
    )
    serve.add_argument(
        "--precision",
        help="auto, float32, bfloat16, float16 or int8 (default: auto, the fastest that the "
        "device has and the bundle holds; int8 only where it holds nothing else)",
    )
    serve.add_argument(
        "--deterministic",
        action="store_const",
        const=True,
        help="serve only where a pair's loss is the same bits whoever shares its batch",
    )
    serve.add_argument("--max-batch-tokens", help="tokens of a batch (default: 4096)")
    serve.add_argument(
        "--admin-port", help="a second port, for health, metrics and reloads (default: none)"
    )
    serve.add_argument("--admin-host", help="where that one listens (default: 127.0.0.1)")
    serve.add_argument(
        "--api-keys-file", metavar="FILE.toml", help="who may ask (default: everybody)"
    )
    serve.add_argument("--tls-certificate-file", metavar="FILE.pem", help="serve HTTPS")
    serve.add_argument("--tls-key-file", metavar="FILE.pem", help="the certificate's key")
    serve.add_argument("--log-format", help="text, or json: an object a line (default: text)")
    serve.set_defaults(run=_serve)


def _add_export(export: argparse.ArgumentParser) -> None:
    export.add_argument("checkpoint", help="a local folder or a hub name")
    export.add_argument("--output", type=Path, required=True, help="the bundle's folder")
    export.add_argument(
        "--engine",
        choices=get_args(EngineName),
        nargs="+",
        default=["torch"],
        help="whose graphs; the first one is preferred when the bundle is served (default: torch)",
    )
    export.add_argument(
        "--precision",
        choices=get_args(Precision),
        nargs="+",
        help="one graph for each; Torch graphs share the weights (default: float32 bfloat16 for "
        "torch, float32 for onnx)",
    )
    export.add_argument(
        "--unsafe-float16",
        action="store_true",
        help="allow float16 for families that are known to overflow in it",
    )
    export.add_argument(
        "--generic",
        action="store_true",
        help="Torch graphs of transformers' own model, also where there is a native one",
    )
    _add_what_bundles_say(export)
    export.set_defaults(run=_export)


def _add_import(import_: argparse.ArgumentParser) -> None:
    import_.add_argument(
        "folder",
        type=Path,
        help="holds encoder_model.onnx, decoder_model.onnx and config.json, as Optimum writes them",
    )
    import_.add_argument("--output", type=Path, required=True, help="the bundle's folder")
    _add_what_bundles_say(import_)
    import_.set_defaults(run=_import)


def _add_what_bundles_say(making: argparse.ArgumentParser) -> None:
    making.add_argument(
        "--exclude-classes",
        type=_range,
        nargs="+",
        default=[],
        metavar="FIRST[-LAST]",
        help="classes to keep out of the softmax, such as ids that are sources only",
    )
    making.add_argument(
        "--decoder-start-token-id",
        type=int,
        metavar="ID",
        help="what the decoder is fed first (default: as the configuration says)",
    )
    making.add_argument("--force", action="store_true", help="replace a bundle at the output")


def _add_verify(verify: argparse.ArgumentParser) -> None:
    verify.add_argument("bundle", type=Path)
    verify.add_argument(
        "--against", required=True, metavar="CHECKPOINT", help="a local folder or a hub name"
    )
    verify.add_argument("--device", default="auto", help="auto, cpu or cuda:N (default: auto)")
    verify.add_argument(
        "--sources",
        type=_positive,
        default=16,
        metavar="N",
        help="random sources; each gets four targets that are drawn from the model (default: 16)",
    )
    verify.add_argument(
        "--pairs",
        type=Path,
        metavar="FILE",
        help="pairs of your own beside them: a JSON object a line, with source_ids and target_ids",
    )
    verify.add_argument("--json", action="store_true", help="print JSON instead of a table")
    verify.set_defaults(run=_verify)


def _add_inspect(inspect: argparse.ArgumentParser) -> None:
    inspect.add_argument("bundle", type=Path)
    inspect.set_defaults(run=_inspect)


def _add_ray_score(ray_score: argparse.ArgumentParser) -> None:
    ray_score.add_argument(
        "input", help="a .parquet or .jsonl file, a folder of them, or a URI such as s3://..."
    )
    ray_score.add_argument("output", help="a folder or URI; a run that ended early goes on there")
    ray_score.add_argument(
        "--bundle", required=True, help="the bundle's folder, the same on every machine"
    )
    ray_score.add_argument(
        "--source-column", metavar="NAME", help="(default: source_ids, or source with --text)"
    )
    ray_score.add_argument(
        "--target-column", metavar="NAME", help="(default: target_ids, or target with --text)"
    )
    ray_score.add_argument(
        "--text", action="store_true", help="the columns hold texts, for the bundle's tokenizers"
    )
    ray_score.add_argument("--source-language", metavar="NAME", help="of texts; with --text")
    ray_score.add_argument("--target-language", metavar="NAME", help="of texts; with --text")
    ray_score.add_argument(
        "--prefix-length",
        type=_not_negative,
        default=0,
        metavar="N",
        help="ids at the beginning of each target that are fed and do not count; not with --text "
        "(default: 0)",
    )
    ray_score.add_argument(
        "--keep", nargs="+", default=[], metavar="COLUMN", help="copy these into the output"
    )
    ray_score.add_argument("--tokens", action="store_true", help="write each token's nll as well")
    ray_score.add_argument(
        "--partition-rows", type=_positive, metavar="N", help="pairs of an output file, at most"
    )
    ray_score.add_argument(
        "--workers",
        type=_positive,
        metavar="N",
        help="(default: one per GPU of the cluster; without GPUs one per machine)",
    )
    ray_score.add_argument(
        "--cpus-per-worker",
        type=_positive,
        metavar="N",
        help="its threads (default: one beside a GPU, else all of the smallest machine, or as many "
        "as leave all workers a place)",
    )
    ray_score.add_argument(
        "--address", help="of a Ray cluster (default: $RAY_ADDRESS, else this machine alone)"
    )
    ray_score.add_argument("--device", help="auto, cpu or cuda: a card for each (default: auto)")
    for name in ("engine", "precision", "max-batch-tokens"):
        ray_score.add_argument(f"--{name}", help="as of seqloss serve")
    ray_score.set_defaults(run=_ray_score)


def _not_negative(text: str) -> int:
    if not re.fullmatch(r"\d+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0")
    return int(text)


def _positive(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return int(text)


def _range(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is neither FIRST nor FIRST-LAST")
    first, last = match.groups()
    return int(first), int(last or first)


def _serve(options: argparse.Namespace) -> int:
    if hasattr(signal, "SIGHUP"):  # until it can reload: by default it would end the process
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    process.prepare()
    from seqloss.bundle.reader import open_bundle

    settings = _settings(options)
    logs.configure(settings.log_format)
    named = _named(options.bundles)
    with ThreadPoolExecutor() as pool:
        opened = pool.map(open_bundle, named.values())
        from seqloss.http.server import serve  # a slow import, while digests are computed

        bundles = dict(zip(named, opened, strict=True))
    if serve(bundles, settings):
        return 0
    # The device's thread may be in a batch that never ends, and Python would wait for it.
    logging.shutdown()
    os._exit(1)


def _settings(options: argparse.Namespace) -> Settings:
    given = vars(options).items()
    return load_settings(
        **{
            name: value
            for name, value in given
            if name in Settings.model_fields and value is not None
        }
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
    with _needs_extra("export"):
        from seqloss.export.exporter import ExportOptions, export_checkpoint

    manifest = export_checkpoint(
        options.checkpoint,
        options.output,
        ExportOptions(
            engines=tuple(dict.fromkeys(options.engine)),
            precisions=options.precision and tuple(dict.fromkeys(options.precision)),
            excluded_classes=tuple(options.exclude_classes),
            decoder_start=options.decoder_start_token_id,
            unsafe_float16=options.unsafe_float16,
            generic=options.generic,
            force=options.force,
        ),
    )
    _print_errors(options.output, manifest)
    return 0


def _import(options: argparse.Namespace) -> int:
    with _needs_extra("export"):
        from seqloss.export.importer import ImportOptions, import_onnx

    manifest = import_onnx(
        options.folder,
        options.output,
        ImportOptions(
            excluded_classes=tuple(options.exclude_classes),
            decoder_start=options.decoder_start_token_id,
            force=options.force,
        ),
    )
    _print_errors(options.output, manifest)
    return 0


def _print_errors(output: Path, manifest: Manifest) -> None:
    print(f"{output}: {manifest.family}; nats per token from {manifest.self_test.described}:")
    for graph in manifest.graphs:
        print(
            f"  {graph.engine} in {graph.precision}: at most {graph.max_error:.1e}, "
            f"{graph.mean_error:.1e} on average"
        )
    print(f"serve it: seqloss serve {output}")


def _verify(options: argparse.Namespace) -> int:
    with _needs_extra("export"):
        from seqloss.export.verify import VerifyOptions, verify_bundle
    from seqloss.bundle.reader import open_bundle

    verification = verify_bundle(
        open_bundle(options.bundle),
        options.against,
        VerifyOptions(options.device, options.sources, options.pairs),
    )
    if options.json:
        print(json.dumps(verification.as_json(), indent=1, allow_nan=False))
    else:
        print(verification.as_text())
    return 0 if verification.passed else 1


def _inspect(options: argparse.Namespace) -> int:
    from seqloss.bundle.inspect import describe
    from seqloss.bundle.reader import open_bundle

    print(describe(open_bundle(options.bundle)))
    return 0


def _ray_score(options: argparse.Namespace) -> int:
    with _needs_extra("ray"):
        from seqloss.distributed.pool import Pool
        from seqloss.distributed.ray_score import score_and_show
        from seqloss.distributed.tables import PairColumns
        from seqloss.distributed.workers import Work

    kind = "" if options.text else "_ids"
    settings = ("device", "engine", "precision", "max_batch_tokens")
    return score_and_show(
        Work(
            source=options.input,
            output=options.output,
            bundle=options.bundle,
            settings={
                name: getattr(options, name)
                for name in settings
                if getattr(options, name) is not None
            },
            columns=PairColumns(
                options.source_column or f"source{kind}",
                options.target_column or f"target{kind}",
                options.text,
                options.source_language,
                options.target_language,
                options.prefix_length,
            ),
            kept=tuple(dict.fromkeys(options.keep)),
            with_tokens=options.tokens,
        ),
        Pool(options.partition_rows, options.workers, options.cpus_per_worker),
        options.address,
    )


@contextmanager
def _needs_extra(extra: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise ConfigurationError(
            f"this command needs {error.name}: pip install 'seqloss[{extra}]'"
        ) from error


if __name__ == "__main__":
    sys.exit(main())
