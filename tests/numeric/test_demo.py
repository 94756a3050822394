"""The demo model is what it is said to be: small, right, and hard to fool."""

from __future__ import annotations

import json
import random
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from tokenizers import Tokenizer

from seqloss.demo import BACKWARD_CHECKPOINT, CHECKPOINT, phrases
from seqloss.demo.corruptions import CORRUPTIONS, corrupt
from seqloss.demo.greeting import example_request
from seqloss.demo.recipe import Recipe, make_checkpoint
from seqloss.export.huggingface import load_checkpoint

HELD_OUT_PAIRS = 400
MAX_MEAN_NLL = 0.05
MIN_SHARE_TOLD_APART = 0.99


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))


@pytest.fixture(scope="module")
def held_out() -> list[phrases.Phrase]:
    return list(islice(phrases.pairs("held_out", seed=99), HELD_OUT_PAIRS))


@pytest.fixture
def demo(make_client: Any, bundle_of: Any, tokenizer: Tokenizer) -> Any:
    """Scores texts: sources and targets to the reply."""
    client = make_client({"demo": bundle_of("demo")})

    def score(sources: list[str], targets: list[str]) -> dict[str, Any]:
        body = {
            "source_ids": [encoding.ids for encoding in tokenizer.encode_batch(sources)],
            "target_ids": [encoding.ids for encoding in tokenizer.encode_batch(targets)],
        }
        reply: dict[str, Any] = client.post("/loss", json=body).json()
        return reply

    return score


def test_held_out_pairs_have_a_small_loss(
    demo: Any, held_out: list[phrases.Phrase], capsys: pytest.CaptureFixture[str]
) -> None:
    reply = demo([pair.source for pair in held_out], [pair.target for pair in held_out])
    mean = reply["aggregate"]["nll"] / reply["aggregate"]["num_tokens"]
    with capsys.disabled():
        print(f"\ndemo: mean nll per token of {len(held_out)} held-out pairs: {mean:.6f}")
    assert mean <= MAX_MEAN_NLL


def test_a_right_pair_has_a_smaller_loss_than_a_corrupted_one(
    demo: Any, held_out: list[phrases.Phrase], capsys: pytest.CaptureFixture[str]
) -> None:
    generator = random.Random(7)
    cases = [
        (pair, corruption, corrupted)
        for pair in held_out
        for corruption in CORRUPTIONS
        if (corrupted := corrupt(pair, corruption, generator)) is not None
    ]
    sources = [pair.source for pair, _, _ in cases]
    right = np.array(demo(sources, [pair.target for pair, _, _ in cases])["mean_losses"])
    wrong = np.array(demo(sources, [corrupted for _, _, corrupted in cases])["mean_losses"])
    kinds = np.array([corruption for _, corruption, _ in cases])
    with capsys.disabled():
        print()
        for kind in CORRUPTIONS:
            told_apart = (right < wrong)[kinds == kind]
            print(f"demo: {kind:8} {told_apart.mean():8.3%} of {len(told_apart)} told apart")
            assert len(told_apart) > 50
        print(f"demo: all      {(right < wrong).mean():8.3%} of {len(cases)} told apart")
    assert (right < wrong).mean() >= MIN_SHARE_TOLD_APART


@pytest.mark.parametrize("checkpoint", [CHECKPOINT, BACKWARD_CHECKPOINT])
def test_the_models_are_small(checkpoint: Path) -> None:
    with safe_open(checkpoint / "model.safetensors", "pt") as weights:
        names = weights.keys()
        num_parameters = sum(weights.get_tensor(name).numel() for name in names)
    assert num_parameters <= 1_500_000


@pytest.mark.parametrize("checkpoint", [CHECKPOINT, BACKWARD_CHECKPOINT])
def test_the_checkpoints_carry_the_licence_of_their_data(checkpoint: Path) -> None:
    assert "UNICODE LICENSE" in (checkpoint / "LICENSE.unicode").read_text()


def test_the_target_is_a_function_of_the_source() -> None:
    seen: dict[str, str] = {}
    for split in ("train", "held_out"):
        for pair in islice(phrases.pairs(split, seed=3), 30_000):  # type: ignore[arg-type]
            assert seen.setdefault(pair.source, pair.target) == pair.target, pair


def test_held_out_values_are_in_no_training_pair(held_out: list[phrases.Phrase]) -> None:
    trained = {repr(pair.value) for pair in islice(phrases.pairs("train", seed=4), 30_000)}
    assert not trained & {repr(pair.value) for pair in held_out}
    assert len({pair.kind for pair in held_out}) > 25, "the held-out pairs show few forms"


def test_the_example_of_the_readme_is_in_the_data() -> None:
    moment = datetime(2026, 3, 5, 16, 5)
    assert phrases.render("moment.full", moment, "en") == "Thursday, March 5, 2026 at 4:05 PM"
    assert phrases.render("moment.full", moment, "de") == "Donnerstag, 5. März 2026 um 16:05"


def test_the_greeting_tells_right_from_wrong(make_client: Any, bundle_of: Any) -> None:
    client = make_client({"demo": bundle_of("demo")})
    right, wrong = client.post("/loss", json=example_request()).json()["losses"]
    assert right < 0.1
    assert wrong > 5


@pytest.mark.parametrize("is_backward", [False, True])
def test_the_recipe_makes_a_checkpoint_that_can_be_exported(
    tmp_path: Path, is_backward: bool
) -> None:
    tiny = Recipe(is_backward, num_pairs=300, steps=2, batch_pairs=8, vocabulary=300)
    make_checkpoint(tiny, tmp_path)
    assert load_checkpoint(str(tmp_path)).model_type == "marian"
    config = json.loads((tmp_path / "config.json").read_text())
    shipped = json.loads((CHECKPOINT / "config.json").read_text())
    changed = {name for name in config if config[name] != shipped[name]}
    assert changed <= {"vocab_size", "decoder_vocab_size"}
