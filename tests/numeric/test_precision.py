"""Graphs in 16 bits: how far off they are, what they never are, and which one is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from checkpoints import MAIN_FAMILIES, VOCABULARY_SIZE, make_model, save_checkpoint
from numeric.reference import reference
from seqloss.bundle.manifest import WEIGHTS_NAME
from seqloss.bundle.reader import Bundle, open_bundle
from seqloss.cli import main
from seqloss.engines import torch_engine
from seqloss.engines.loader import load_engine
from seqloss.engines.self_test import token_nlls
from seqloss.engines.torch_engine import precisions_by_speed
from seqloss.errors import ConfigurationError
from seqloss.export.exporter import ExportOptions, export_checkpoint
from seqloss.loss.head import LossHead, output_projection

PRECISIONS = ("float32", "bfloat16", "float16")
# Of errors of a pair's mean nll in bfloat16, in nats.
MEAN_ERROR, LARGEST_ERROR = 0.01, 0.05
# Four times what was measured.
COMPANY_TOLERANCE = 0.03
MANY_TOKENS = 100_000
CPU = torch.device("cpu")


@torch.inference_mode()
def continued(model: Any, sources: torch.Tensor, length: int, *, greedy: bool) -> list[list[int]]:
    """Targets that the model itself makes of sources, drawn or the likeliest token by token."""
    encoded = model.get_encoder()(input_ids=sources, return_dict=True)
    ids = torch.full((len(sources), 1), model.config.decoder_start_token_id)
    cache = None
    for _ in range(length):
        output = model(
            encoder_outputs=encoded,
            attention_mask=torch.ones_like(sources),
            decoder_input_ids=ids[:, -1:],
            past_key_values=cache,
            use_cache=True,
        )
        cache, logits = output.past_key_values, output.logits[:, -1]
        # M2M100 would take it for padding.
        logits[:, model.config.pad_token_id] = -torch.inf
        if greedy:
            chosen = logits.argmax(-1, keepdim=True)
        else:
            chosen = torch.multinomial(logits.softmax(-1), 1)
        ids = torch.cat([ids, chosen], dim=1)
    rows: list[list[int]] = ids[:, 1:].tolist()
    return rows


def drawn_pairs(family: str) -> tuple[list[list[int]], list[list[int]]]:
    """Sources of random ids and targets drawn from the model, of 8 to 48 tokens each."""
    model = make_model(family)
    torch.manual_seed(5)
    generator = np.random.default_rng(5)
    ids = np.setdiff1d(np.arange(VOCABULARY_SIZE), [model.config.pad_token_id])
    sources, targets = [], []
    for source_length, target_length in generator.integers(8, 49, (32, 2)):
        source = generator.choice(ids, source_length).tolist()
        sources.append(source)
        targets += continued(model, torch.tensor([source]), target_length, greedy=False)
    return sources, targets


def mean_losses(client: Any, sources: Any, targets: Any) -> np.ndarray:
    response = client.post("/loss", json={"source_ids": sources, "target_ids": targets})
    assert response.status_code == 200, response.text
    return np.array(response.json()["mean_losses"])


@pytest.mark.parametrize("family", MAIN_FAMILIES)
def test_a_pair_in_bfloat16_is_close_to_transformers_alone_and_in_company(
    family: str, device: str, bundle_of: Any, make_client: Any
) -> None:
    client = make_client({family: bundle_of(family)}, device=device, precision="bfloat16")
    sources, targets = drawn_pairs(family)
    model = make_model(family)
    start = model.config.decoder_start_token_id
    expected = [
        reference(model, source, [start, *target[:-1]], target).nll.mean()
        for source, target in zip(sources, targets, strict=True)
    ]
    together = mean_losses(client, sources, targets)
    errors = np.abs(together - expected)
    assert errors.mean() <= MEAN_ERROR
    assert errors.max() <= LARGEST_ERROR
    assert errors.max() > 1e-5, "so exact is float32 only"
    alone = [
        mean_losses(client, [source], [target])[0]
        for source, target in zip(sources[:12], targets[:12], strict=True)
    ]
    assert np.abs(together[:12] - alone).max() <= COMPANY_TOLERANCE


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_head_gives_no_negative_loss_rank_or_entropy(precision: str) -> None:
    generator = torch.Generator().manual_seed(23)
    weight = torch.randn(300, 32, generator=generator)
    bias = torch.randn(300, generator=generator)
    hidden = torch.randn(MANY_TOKENS, 32, generator=generator) * 2
    labels = (hidden @ weight.T + bias).argmax(-1)
    # Some are as wrong as can be.
    labels[::20] = torch.randint(300, labels[::20].shape, generator=generator)
    logprob, mean_logprob, rank, entropy = LossHead(
        output_projection(weight.to(getattr(torch, precision)), bias, []),
        vocabulary_block=64,
        token_block=8192,
    ).terms(hidden, labels, with_ranks_and_entropies=True)
    assert all(term.isfinite().all() for term in (logprob, mean_logprob, entropy))
    assert (logprob <= 0).all()
    assert (rank >= 0).all()
    assert (entropy >= 0).all()
    assert (logprob > -1e-6).sum() > 1000, "the test needs tokens near certainty"
    assert (logprob < -20).sum() > 1000, "and tokens near impossibility"


@pytest.fixture(scope="module")
def sure_model() -> Any:
    """Marian with logits three times as large: its own choices cost it next to nothing."""
    model: Any = make_model("marian")
    last = model.model.decoder.layers[-1].final_layer_norm
    with torch.no_grad():
        last.weight.mul_(3)
        last.bias.mul_(3)
    return model


@pytest.fixture(scope="module")
def sure_bundle(sure_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """It in all precisions."""
    folder = tmp_path_factory.mktemp("sure")
    sure_model.save_pretrained(folder / "checkpoint")
    options = ExportOptions(precisions=PRECISIONS)
    export_checkpoint(str(folder / "checkpoint"), folder / "bundle", options)
    return open_bundle(folder / "bundle")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_engine_gives_no_negative_loss(
    precision: Any, sure_model: Any, sure_bundle: Bundle
) -> None:
    """Every precision passes the bundle's self-test, too."""
    engine = load_engine(sure_bundle, "cpu", precision)
    assert engine.info.precision == precision
    generator = torch.Generator().manual_seed(29)
    sources = torch.randint(VOCABULARY_SIZE - 1, (MANY_TOKENS // 40, 6), generator=generator)
    targets = continued(sure_model, sources, 40, greedy=True)
    start = sure_model.config.decoder_start_token_id
    nlls = np.concatenate(
        [
            token_nlls(
                engine, sources[part : part + 250].tolist(), targets[part : part + 250], start
            )
            for part in range(0, len(targets), 250)
        ]
    )
    assert len(nlls) == MANY_TOKENS
    assert np.isfinite(nlls).all()
    assert (nlls >= 0).all()
    assert (nlls < 1e-6).sum() > 1000, "the test needs tokens near certainty"


def test_all_precisions_share_one_file_of_weights(sure_bundle: Bundle) -> None:
    assert [graph.precision for graph in sure_bundle.manifest.graphs] == list(PRECISIONS)
    folder = sure_bundle.folder
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert [path for path in files if path.suffix == ".safetensors"] == [folder / WEIGHTS_NAME]
    weights = load_file(folder / WEIGHTS_NAME).values()
    assert {weight.dtype for weight in weights} == {torch.float32}
    stored = load_file(folder.parent / "checkpoint" / "model.safetensors").values()
    extra = sum(one.nbytes for one in weights) - sum(one.nbytes for one in stored)
    # The output layer's means, and the sinusoids, which transformers does not store.
    assert extra <= 20_000


@pytest.mark.parametrize(
    ("by_speed", "expected"),
    [
        (("float16", "bfloat16", "float32"), "bfloat16"),  # the bundle holds no float16
        (("float32",), "float32"),
    ],
)
def test_auto_takes_the_fastest_precision_that_the_bundle_holds(
    by_speed: Any, expected: str, bundle_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def answer(device: torch.device) -> Any:
        asked.append(device)
        return by_speed

    monkeypatch.setattr(torch_engine, "precisions_by_speed", answer)
    assert load_engine(bundle_of("marian"), "cpu", "auto").info.precision == expected
    assert asked == [CPU]


def test_a_precision_that_the_bundle_has_not_is_refused(bundle_of: Any) -> None:
    words = "holds float32, bfloat16 for torch, and not float16"
    with pytest.raises(ConfigurationError, match=words):
        load_engine(bundle_of("marian"), "cpu", "float16")


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, ("bfloat16", "float32")),
        ({"amx_bf16": True, "amx_fp16": True}, ("bfloat16", "float16", "float32")),
        ({"avx512_bf16": False, "avx512_f": True}, ("float32",)),
        ({}, ("float32",)),
    ],
)
def test_a_cpu_is_fast_in_what_it_multiplies_in_hardware(
    capabilities: dict[str, bool], expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert precisions_by_speed(CPU) == expected


@pytest.mark.gpu
def test_a_gpu_is_fast_in_16_bits() -> None:
    if not torch.cuda.is_available():
        pytest.skip("there is no NVIDIA GPU")
    device = torch.device("cuda:0")
    found = precisions_by_speed(device)
    assert found[-1] == "float32"
    assert ("bfloat16" in found) == (torch.cuda.get_device_capability(device)[0] >= 8)


def test_float16_is_refused_by_name_where_a_family_overflows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, output = save_checkpoint("t5", tmp_path / "checkpoint"), tmp_path / "bundle"
    arguments = ["export", str(checkpoint), "--output", str(output), "--precision", "float16"]
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert "T5" in said
    assert "float16" in said
    assert not output.exists()
    assert main([*arguments, "--unsafe-float16"]) == 0
    assert [graph.precision for graph in open_bundle(output).manifest.graphs] == ["float16"]
