"""What the parts share: what was asked for, and models, made when a part needs them first."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from benchmarks import prepare
from benchmarks.models import MODELS, shape_of
from benchmarks.operations import Shape
from benchmarks.progress import say
from benchmarks.served import ServedBundle
from benchmarks.serving.clients import IdLimits
from seqloss.bundle.manifest import Precision
from seqloss.bundle.reader import open_bundle
from seqloss.demo import CHECKPOINT


@dataclass(frozen=True, slots=True)
class Plan:
    """What is asked for: the arguments of the command line.

    Attributes:
        parts: names of those to run.
        model: a name in `benchmarks.models.MODELS`.
        precision: of its bundle, and of how it is served.
        device: of servers and engines.
        threads: for matrix products.
        rounds: in which two things are compared in turn.
        seconds: that each phase of load is measured for.
        repetitions: of each stage.
        waiting_pairs: that batches are formed of.
        pairs: that are scored in a round with `model`; the demo model gets more.
        folder: where models are kept.
    """

    parts: tuple[str, ...]
    model: str
    precision: Precision
    device: str
    threads: int
    rounds: int
    seconds: float
    repetitions: int
    waiting_pairs: int
    pairs: int
    folder: Path

    @property
    def warm_up_seconds(self) -> float:
        """Of load before each measurement."""
        return self.seconds / 4


@dataclass(frozen=True, slots=True)
class Bundled:
    """A bundle, and how it is run."""

    name: str
    bundle: Path
    precision: Precision
    device: str
    threads: int

    def serve(self) -> ServedBundle:
        """A server with it, ready."""
        say(f"serving {self.name}")
        return ServedBundle(self.bundle, self.precision, self.threads, self.device)

    @property
    def limits(self) -> IdLimits:
        """What ids and lengths it takes."""
        manifest = open_bundle(self.bundle).manifest
        lengths = filter(None, (manifest.max_source_tokens, manifest.max_target_tokens))
        vocabulary = min(manifest.vocabulary.source, manifest.vocabulary.target)
        return IdLimits(vocabulary, min(lengths, default=4096))


class Workbench:
    """The plan, and its models as bundles."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    @cached_property
    def model(self) -> Bundled:
        """The random model that was asked for."""
        model = MODELS[self.plan.model]
        scale = model.default_scale()
        folder = self.plan.folder / f"{self.plan.model}-{scale:.2f}"
        say(f"making the model in {folder}, where it is not there yet")
        checkpoint = prepare.checkpoint_of(model, scale, folder)
        return self._bundled(self.plan.model, checkpoint, self.plan.precision, folder / "serving")

    @cached_property
    def demo(self) -> Bundled:
        """The demo model, in float32 as `make serve` has it."""
        return self._bundled("demo", CHECKPOINT, "float32", self.plan.folder / "demo")

    def _bundled(self, name: str, checkpoint: Path, precision: Precision, folder: Path) -> Bundled:
        folder.mkdir(parents=True, exist_ok=True)
        bundle = prepare.export_bundle(checkpoint, [precision], folder)
        return Bundled(name, bundle, precision, self.plan.device, self.plan.threads)

    @property
    def shape(self) -> Shape:
        """The sizes of `model`."""
        return shape_of(MODELS[self.plan.model].config())
