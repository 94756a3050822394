"""With kernels or without, now or later: losses are the same, and there always is an engine."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints import VOCABULARY_SIZE
from fakes import FakeEngine
from numeric.reference import random_pairs
from seqloss.bundle.reader import Bundle
from seqloss.engines import loader, upgrading
from seqloss.engines.loader import KernelOptions, load_engine
from seqloss.engines.self_test import token_nlls
from seqloss.engines.torch_engine import TorchEngine
from seqloss.engines.upgrading import UpgradingEngine
from seqloss.errors import ConfigurationError, KernelsUnavailableError, SelfTestError
from seqloss.kernels import build
from seqloss.kernels.build import built
from seqloss.records import Batch, Ragged
from seqloss.settings import USER_CACHE

TOLERANCE = 2e-5

BATCH = Batch(
    sources=Ragged.from_rows([[3, 1, 4], [1, 5]], np.int32),
    source_row=np.array([0, 1], np.int32),
    decoder_input_ids=Ragged.from_rows([[9, 7, 8], [9]], np.int32),
    labels=np.array([7, 8, 9, 2], np.int32),
    counted=np.ones(4, np.bool_),
)


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.fixture
def broken_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\necho out of coffee >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))


def losses(engine: Any) -> list[float]:
    found: list[float] = engine.score(BATCH).target_logprob.tolist()
    return found


def load(bundle: Bundle, **options: Any) -> Any:
    return load_engine(bundle, "cpu", "float32", kernels=KernelOptions(**options))


def wait_for_upgrades() -> None:
    """Until better engines are there, or have failed to be."""
    for thread in threading.enumerate():
        if thread.name == "seqloss-kernels":
            thread.join(60)
            assert not thread.is_alive()


# ---------------------------------------------------------------- the same losses


@pytest.mark.parametrize("family", ["narrow-marian", "wide-marian", "wide-t5", "wide-bart"])
def test_losses_are_the_same_without_kernels(
    family: str, bundle_of: Any, kernel_library: Any
) -> None:
    bundle = bundle_of(family)
    graph = bundle.manifest.graph("torch", "float32")
    engines = [TorchEngine(bundle, graph, "cpu", library) for library in (None, kernel_library)]
    assert [engine.info.has_kernels for engine in engines] == [False, True]
    pairs = random_pairs(3, VOCABULARY_SIZE, 40, pad=bundle.manifest.special_ids.pad)
    sources = [pairs["source_ids"][index] for index in pairs["source_index"]]
    plain, compiled = (
        token_nlls(engine, sources, pairs["target_ids"], bundle.manifest.special_ids.decoder_start)
        for engine in engines
    )
    assert np.abs(plain - compiled).max() <= TOLERANCE


@pytest.mark.parametrize(("family", "invariant"), [("wide-marian", True), ("narrow-marian", False)])
def test_losses_are_the_same_in_every_batch_only_where_each_operator_has_a_kernel(
    family: str, invariant: bool, bundle_of: Any, kernel_library: Any
) -> None:
    """There is none for attention heads of 4, and Torch's depend on the batch."""
    bundle = bundle_of(family)
    graph = bundle.manifest.graph("torch", "float32")
    assert not TorchEngine(bundle, graph, "cpu").info.is_batch_invariant
    engine = TorchEngine(bundle, graph, "cpu", kernel_library)
    assert engine.info.is_batch_invariant == invariant


# ---------------------------------------------------------------- now, later or never


def test_an_engine_answers_at_once_and_has_kernels_later(
    bundle_of: Any, kernel_library: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled, may_compile = built(USER_CACHE), threading.Event()

    def compile_later(path: Path, _: Any) -> None:
        assert may_compile.wait(60)
        shutil.copy(compiled, path)

    monkeypatch.setattr(build, "_compile", compile_later)
    engine = load(bundle_of("wide-marian"), cache=tmp_path / "cache", wait=False)
    assert isinstance(engine, UpgradingEngine)
    first = losses(engine)
    assert not engine.info.has_kernels
    assert not engine.info.is_batch_invariant
    may_compile.set()
    wait_for_upgrades()
    assert engine.info.has_kernels
    assert engine.info.is_batch_invariant
    np.testing.assert_allclose(losses(engine), first, rtol=0, atol=TOLERANCE)
    again = load(bundle_of("wide-marian"), cache=tmp_path / "cache", wait=False)
    assert isinstance(again, TorchEngine), "there is nothing to wait for"
    assert again.info.has_kernels
    assert losses(again) == losses(engine)


@pytest.mark.parametrize("reason", ["no_compiler", "broken_compiler"])
def test_without_kernels_the_first_engine_goes_on(
    reason: str,
    bundle_of: Any,
    kernel_library: Any,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    caplog: pytest.LogCaptureFixture,
) -> None:
    bundle = bundle_of("marian")
    request.getfixturevalue(reason)
    said = {"no_compiler": "there is no C++ compiler", "broken_compiler": "out of coffee"}[reason]
    plain = losses(load(bundle, cache=None))
    for wait in (True, False):
        caplog.clear()
        engine = load(bundle, cache=tmp_path / "cache", wait=wait)
        if isinstance(engine, UpgradingEngine):
            wait_for_upgrades()
        assert not engine.info.has_kernels
        assert losses(engine) == plain
        (record,) = [one for one in caplog.records if one.name.startswith("seqloss")]
        assert record.levelname == "WARNING"
        assert said in record.getMessage()


def test_a_folder_that_cannot_be_looked_into_costs_the_kernels_alone(
    bundle_of: Any, kernel_library: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As that of a user who may not look there; a name that is too long fails alike for root."""
    for wait in (True, False):
        caplog.clear()
        engine = load(bundle_of("marian"), cache=tmp_path / ("long" * 100), wait=wait)
        wait_for_upgrades()
        assert not engine.info.has_kernels
        assert len(losses(engine)) == 4
        (record,) = [one for one in caplog.records if one.name.startswith("seqloss")]
        assert record.levelname == "WARNING"
        assert "cannot be used" in record.getMessage()


def test_bfloat16_has_no_kernels_where_the_cpu_has_no_instructions_for_it(
    bundle_of: Any,
    kernel_library: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(loader, "instructions", lambda: build.AVX512)
    bundle = bundle_of("wide-marian")
    for wait in (True, False):
        caplog.clear()
        engine = load_engine(bundle, "cpu", "bfloat16", kernels=KernelOptions(wait=wait))
        wait_for_upgrades()
        assert not engine.info.has_kernels
        assert len(losses(engine)) == 4
        (record,) = [one for one in caplog.records if one.name.startswith("seqloss")]
        assert record.levelname == "WARNING"
        assert "avx512_bf16" in record.getMessage()
    with pytest.raises(ConfigurationError, match="avx512_bf16"):
        load_engine(bundle, "cpu", "bfloat16", kernels=KernelOptions(required=True))


@pytest.mark.parametrize("content", [b"", b"\x7fELF and no more"])
def test_a_library_that_does_not_load_is_none(
    content: bytes,
    bundle_of: Any,
    kernel_library: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A disk was full, or a machine went off: what is in the cache is no library."""
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o700)
    (cache / built(USER_CACHE).name).write_bytes(content)
    engine = load(bundle_of("marian"), cache=cache)
    assert len(losses(engine)) == 4
    assert any(record.levelname == "WARNING" for record in caplog.records)


@pytest.mark.parametrize("are_there", [True, False])
@pytest.mark.parametrize("wait", [True, False])
def test_kernels_that_fail_the_self_test_are_not_used(
    wait: bool,
    are_there: bool,
    bundle_of: Any,
    kernel_library: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As on a machine whose compiler is broken in a way that shows in numbers alone.

    Nor where an earlier start has compiled them.
    """
    require, is_built = loader.require_self_test, loader.is_built

    def fail_kernels(engine: Any, *others: Any) -> Any:
        if engine.info.has_kernels:
            raise SelfTestError("the kernels are off by 3 nats")
        return require(engine, *others)

    monkeypatch.setattr(loader, "require_self_test", fail_kernels)
    assert is_built(USER_CACHE)
    if not are_there:
        monkeypatch.setattr(loader, "is_built", lambda _: False)
    engine = load(bundle_of("marian"), wait=wait)
    assert isinstance(engine, UpgradingEngine) == (not wait and not are_there)
    wait_for_upgrades()
    assert not engine.info.has_kernels
    assert len(losses(engine)) == 4
    (record,) = [one for one in caplog.records if one.levelname == "ERROR"]
    assert record.getMessage().endswith("are not used: the kernels are off by 3 nats")
    assert "do not compute what they should" in record.getMessage()
    with pytest.raises(SelfTestError):
        load(bundle_of("marian"), required=True)


@pytest.mark.parametrize("reason", ["no_compiler", "broken_compiler", "switched_off"])
def test_required_kernels_that_are_not_there_are_a_mistake_of_configuration(
    reason: str, bundle_of: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    bundle = bundle_of("marian")
    if reason != "switched_off":
        request.getfixturevalue(reason)
    cache = None if reason == "switched_off" else tmp_path / "cache"
    with pytest.raises(ConfigurationError, match=r"compiler|AVX2|coffee"):
        load(bundle, cache=cache, required=True)


@pytest.mark.parametrize("kind", ["onnx", "generic"])
def test_deterministic_takes_a_native_graph(
    kind: str, export_once: Callable[..., Bundle], tmp_path: Path
) -> None:
    bundle = export_once("marian", "onnx" if kind == "onnx" else "torch", generic=kind == "generic")
    with pytest.raises(ConfigurationError, match="deterministically"):
        load(bundle, required=True)


def test_deterministic_is_refused_where_an_operator_has_no_kernel(bundle_of: Any) -> None:
    """Heads of 4 attend by Torch, whose sums depend on the batch."""
    with pytest.raises(ConfigurationError, match="deterministically"):
        load(bundle_of("narrow-marian"), required=True)


# ---------------------------------------------------------------- the exchange itself


class Held:
    """Makes an engine as soon as it may."""

    def __init__(self, better: FakeEngine) -> None:
        self.begun, self.may_end, self._better = threading.Event(), threading.Event(), better

    def __call__(self) -> FakeEngine:
        self.begun.set()
        assert self.may_end.wait(30)
        return self._better


def test_batches_go_to_the_better_engine_once_it_is_there() -> None:
    first, better = FakeEngine(), FakeEngine(has_kernels=True)
    make = Held(better)
    engine = UpgradingEngine(first, make)
    engine.score(BATCH)
    make.may_end.set()
    wait_for_upgrades()
    engine.score(BATCH)
    engine.score(BATCH)
    engine.release_memory()
    assert (len(first.batches), len(better.batches)) == (1, 2)
    assert (first.memory_releases, better.memory_releases) == (0, 1)
    engine.close()
    assert better.closed


def test_an_engine_that_got_no_kernels_is_no_better(caplog: pytest.LogCaptureFixture) -> None:
    """As where a model has sizes that kernels have not."""
    first, same = FakeEngine(), FakeEngine()
    make = Held(same)
    engine = UpgradingEngine(first, make)
    make.may_end.set()
    wait_for_upgrades()
    engine.score(BATCH)
    assert (len(first.batches), len(same.batches)) == (1, 0)
    assert same.closed
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "no kernels" in record.getMessage()


def test_closing_meanwhile_waits_and_frees_both_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upgrading, "_LAST_SECONDS", 600)  # longer than this test waits
    first, better = FakeEngine(), FakeEngine(has_kernels=True)
    make = Held(better)
    engine = UpgradingEngine(first, make)
    assert make.begun.wait(30)
    is_closed = threading.Event()

    def close() -> None:
        engine.close()
        is_closed.set()

    closing = threading.Thread(target=close, daemon=True)
    closing.start()
    assert not is_closed.wait(0.2), "the process could have ended in the midst of it"
    assert first.closed
    assert not better.closed
    make.may_end.set()
    assert is_closed.wait(30)
    assert better.closed
    closing.join(30)


def test_closing_does_not_wait_for_ever(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(upgrading, "_LAST_SECONDS", 0.01)
    first, better = FakeEngine(), FakeEngine(has_kernels=True)
    make = Held(better)
    engine = UpgradingEngine(first, make)
    assert make.begun.wait(30)
    engine.close()
    assert first.closed
    assert not better.closed
    assert "not waited for" in caplog.text
    make.may_end.set()
    wait_for_upgrades()
    assert better.closed


def test_nothing_is_made_for_an_engine_that_is_closed_already(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The machine had no time for the thread before."""
    may_begin, made = threading.Event(), []

    class LateThread(threading.Thread):
        def run(self) -> None:
            assert may_begin.wait(30)
            super().run()

    monkeypatch.setattr(upgrading.threading, "Thread", LateThread)
    monkeypatch.setattr(upgrading, "_LAST_SECONDS", 0.01)
    engine = UpgradingEngine(FakeEngine(), lambda: made.append("better") or FakeEngine())
    engine.close()
    may_begin.set()
    wait_for_upgrades()
    assert not made


@pytest.mark.parametrize(
    ("error", "level", "said"),
    [
        (KernelsUnavailableError("no compiler"), "WARNING", "there are no kernels"),
        (SelfTestError("off by 3 nats"), "ERROR", "the kernels do not compute what they should"),
        (OSError("no space left"), "ERROR", "the engine with kernels could not be made"),
        (MemoryError("too much"), "ERROR", "the engine with kernels could not be made"),
    ],
)
def test_whatever_fails_the_first_engine_goes_on(
    error: Exception, level: str, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> FakeEngine:
        raise error

    first = FakeEngine()
    engine = UpgradingEngine(first, fail)
    wait_for_upgrades()
    engine.score(BATCH)
    assert len(first.batches) == 1
    assert not first.closed
    (record,) = caplog.records
    assert record.levelname == level
    assert record.getMessage().startswith(said)
    assert str(error) in caplog.text
