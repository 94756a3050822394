"""Fixtures: bundles made once per run, and applications around them."""

from __future__ import annotations

import fcntl
import functools
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, settings
from prometheus_client import CollectorRegistry

from fakes import FakeEngine, fake_bundle
from seqloss.bundle.manifest import MANIFEST_NAME, EngineName, Precision
from seqloss.bundle.reader import Bundle, open_bundle
from seqloss.engines.base import Engine
from seqloss.http.app import create_app
from seqloss.settings import Settings
from server import Server

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["KERAS_BACKEND"] = "torch"
# pytest's log capture would have torch.export write megabytes of its trace.
logging.getLogger("torch.__trace").setLevel(logging.CRITICAL)

# The same examples in every run, so that a change is to blame for what fails; a slow machine never
# is.  `make test-long` looks for more.
_ALWAYS = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("ci", derandomize=True, **_ALWAYS)
settings.register_profile("long", max_examples=3000, stateful_step_count=100, **_ALWAYS)
settings.load_profile("ci")

SHARED = Path(__file__).parents[1].parent / "shared"
ORACLE = SHARED / "oracle" / "aren-transliteration"

MakeClient = Callable[..., TestClient]


def pytest_addoption(parser: pytest.Parser) -> None:
    """What a person may ask for beyond what every run does."""
    parser.addoption(
        "--soak-seconds", type=float, default=60, help="how long the soak test goes on"
    )
    parser.addoption(
        "--kills", type=int, default=3, help="how often whoever scores, or asks for it, is killed"
    )
    parser.addoption(
        "--service-kills", type=int, default=1, help="how often the service behind it is"
    )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Tests with the same parameters go to one process: they share what is made for these.

    In others they would wait for an export, and load the same model again.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByParameters(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return nodeid.partition("[")[2] or nodeid

    return ByParameters(config, log)


def _gpu_is_missing() -> str | None:
    """Why tests that need a GPU are skipped, or None."""
    try:
        import torch
    except ImportError:
        return "Torch is not installed"
    return None if torch.cuda.is_available() else "there is no NVIDIA GPU"


@pytest.fixture(params=["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Every device that Torch bundles are served on."""
    if request.param != "cpu" and (reason := _gpu_is_missing()):
        pytest.skip(reason)
    return str(request.param)


# What holds for one engine holds for all of them: modules that say so run once for each.
on_every_engine = pytest.mark.parametrize("engine_name", get_args(EngineName), indirect=True)


@pytest.fixture(scope="session")
def engine_name(request: pytest.FixtureRequest) -> EngineName:
    """Whose graphs `bundle_of` exports: Torch's, where a module does not ask for every engine's."""
    name: EngineName = getattr(request, "param", "torch")
    return name


@pytest.fixture(scope="session")
def export_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Bundle]:
    """Exports a family's random checkpoint, `demo` or `oracle`; each once per run and engine.

    `wide-` before a family's name asks for sizes that all kernels have, `narrow-` for others,
    `generic` for transformers' own graph where there is a native one. Tests that run in several
    processes share what any of them exported.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    made: dict[Path, Bundle] = {}

    def make(name: str, engine: EngineName, *, generic: bool = False) -> Bundle:
        mine = folder / f"{name}-{engine}{'-generic' if generic else ''}"
        if mine not in made:
            mine.mkdir(exist_ok=True)
            with _locked(folder / f"{mine.name}.lock"):
                if not (mine / "bundle" / MANIFEST_NAME).is_file():
                    _export(name, engine, mine, generic=generic)
            made[mine] = open_bundle(mine / "bundle")
        return made[mine]

    return make


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keeps other processes out while it lasts."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def bundle_of(engine_name: EngineName, export_once: Callable[..., Bundle]) -> Callable[..., Bundle]:
    """As `export_once`, of the engine that the test is for."""
    return functools.partial(export_once, engine=engine_name)


@pytest.fixture
def closed_models(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Closes the models that workers load in a test's own process; one that ends need not."""
    from seqloss.distributed.offline import OfflineModel

    opened: list[OfflineModel] = []
    make = OfflineModel.__init__

    def noted(model: OfflineModel, *arguments: Any, **named: Any) -> None:
        make(model, *arguments, **named)
        opened.append(model)

    monkeypatch.setattr(OfflineModel, "__init__", noted)
    yield
    for model in opened:
        model.close()


@pytest.fixture(scope="session", name="kernel_library")
def _kernel_library(request: pytest.FixtureRequest) -> Any:
    """See `compiled_kernels.kernel_library`; the parameter is one of its levels."""
    from compiled_kernels import kernel_library

    return kernel_library(getattr(request, "param", "best"))


def _export(name: str, engine: EngineName, folder: Path, *, generic: bool) -> None:
    from checkpoints import MAIN_FAMILIES, save_checkpoint, sized
    from seqloss.demo import BACKWARD_CHECKPOINT, CHECKPOINT
    from seqloss.export.exporter import ExportOptions, export_checkpoint

    options = ExportOptions(engines=(engine,))
    if name == "demo":
        checkpoint = CHECKPOINT
    elif name == "demo-backward":
        checkpoint = BACKWARD_CHECKPOINT
    elif name == "oracle":
        if not ORACLE.is_dir():
            pytest.skip(f"{ORACLE} is absent: it does not belong to the project")
        # Its classes 43 to 93 are source ids, which the softmax is not over.
        checkpoint = ORACLE
        options = ExportOptions(engines=(engine,), excluded_classes=((43, 93),))
    elif name.startswith(("wide-", "narrow-")):
        size, _, family = name.partition("-")
        checkpoint = save_checkpoint(family, folder / "checkpoint", **sized(family, size))
        options = ExportOptions(engines=(engine,), precisions=("float32", "bfloat16"))
    else:
        checkpoint = save_checkpoint(name, folder / "checkpoint")
        if name in MAIN_FAMILIES:
            lower: Precision = "bfloat16" if engine == "torch" else "int8"
            options = ExportOptions(engines=(engine,), precisions=("float32", lower))
    export_checkpoint(str(checkpoint), folder / "bundle", replace(options, generic=generic))


class KeptEngine:
    """An engine that outlives its application: loading one takes seconds."""

    def __init__(self, engine: Engine) -> None:
        self.info = engine.info
        self.score = engine.score
        self.release_memory = engine.release_memory
        self.memory_bytes = engine.memory_bytes

    def close(self) -> None:
        """The next test goes on with it."""


@pytest.fixture(scope="session")
def load_once() -> Callable[..., Engine]:
    """As `load_engine`, but each engine once per run."""
    from seqloss.engines.loader import KernelOptions, load_engine

    loaded: dict[tuple[Any, ...], Engine] = {}

    def load(bundle: Bundle, *options: Any) -> Engine:
        # Which engine a test meets, with kernels or still without, must not be chance.
        waiting = [
            replace(option, wait=True) if isinstance(option, KernelOptions) else option
            for option in options
        ]
        key = (bundle.digest, *waiting)
        if key not in loaded:
            loaded[key] = KeptEngine(load_engine(bundle, *waiting))
        return loaded[key]

    return load


@pytest.fixture
def make_client(load_once: Callable[..., Engine]) -> Iterator[MakeClient]:
    """Starts an application and waits until its models are loaded, or have failed to.

    Without bundles it serves a fake model under the name `fake`; keyword arguments that are
    settings go to the settings, the others to `create_app`.
    """
    with ExitStack() as stack:

        def make(
            bundles: dict[str, Bundle] | None = None,
            engine: FakeEngine | None = None,
            *,
            wait: bool = True,
            raise_server_exceptions: bool = False,
            **changes: Any,
        ) -> TestClient:
            settings = {"precision": "float32", "warm_up": False} | {
                key: value for key, value in changes.items() if key in Settings.model_fields
            }
            rest = {key: value for key, value in changes.items() if key not in settings}
            if bundles is None:
                bundles = {"fake": fake_bundle()}
                fake = engine or FakeEngine()
                rest.setdefault("load", lambda *_: fake)
            rest.setdefault("load", load_once)
            app = create_app(bundles, Settings(**settings), registry=CollectorRegistry(), **rest)
            client = stack.enter_context(
                TestClient(app, raise_server_exceptions=raise_server_exceptions)
            )
            if wait:
                client.portal.call(_result, app.state.loading)
            return client

        yield make


async def _result(task: Any) -> Any:
    return await task


@pytest.fixture
def client(make_client: MakeClient) -> TestClient:
    """A service with the fake model, in one batch whatever comes."""
    return make_client()


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    """Starts `seqloss serve` with the given arguments; ends it with the test."""
    servers: list[Server] = []

    def start(*arguments: str, port: int = 0) -> Server:
        servers.append(Server(*arguments, port=port))
        return servers[-1]

    yield start
    for server in servers:
        server.process.kill()
        server.process.communicate()
