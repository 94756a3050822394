"""The loss head for GPUs: its numbers in Triton's interpreter, and its kernels compiled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from clients_environment import python_with
from seqloss.loss.head import ABSENT, OutputProjection, output_projection

_HERE = Path(__file__).parent
_ENVIRONMENT = _HERE.parents[1] / "build" / "triton-venv"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="there is no Triton but for Linux")
# Excluded classes of every case; the last one stands at the end of its tile.
_EXCLUDED = (1, 2)


class Case(NamedTuple):
    """What a head is asked."""

    projection: OutputProjection
    dtype: torch.dtype
    hidden: Tensor
    labels: Tensor
    all_terms: bool = True


def case(
    vocabulary: int,
    width: int,
    num_tokens: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    scale: float = 4.0,
    lead: float = 0.0,
) -> Case:
    """Random logits of a standard deviation; class 7 is ahead of all others by some more."""
    generator = torch.Generator().manual_seed(vocabulary + num_tokens)
    weight = torch.randn(vocabulary, width, generator=generator) * scale / width**0.5
    bias = torch.randn(vocabulary, generator=generator)
    bias[7] += lead
    excluded = [*_EXCLUDED, vocabulary - 1]
    labels = torch.randint(3, vocabulary - 1, (num_tokens,), generator=generator)
    return Case(
        output_projection(weight, bias, excluded),
        dtype,
        torch.randn(num_tokens, width, generator=generator),
        labels,
    )


def only_the_label() -> Case:
    """All classes but the label are kept out of the softmax."""
    projection = output_projection(torch.ones(3, 16), None, [0, 2])
    return Case(projection, torch.float32, torch.ones(1, 16), torch.tensor([1]))


CASES = {
    "float32": case(2600, 40, 70, torch.float32),
    "float16": case(2600, 40, 70, torch.float16),
    "bfloat16": case(2600, 40, 70),
    # Of several programs, and more tokens than one has.
    "many": case(6000, 64, 130),
    "peaked": case(2600, 64, 9, scale=30.0),
    # Here exp of the difference does not fit into a float32.
    "far ahead": case(60, 16, 3, torch.float32, lead=300.0),
    # The label is so far ahead of all others that 1 - p is below a float32's last digit.
    "sure": case(60, 16, 3, torch.float32, lead=30.0)._replace(labels=torch.full((3,), 7)),
    "one tile": case(20, 16, 1),
    "only the label": only_the_label(),
}
CASES["two terms"] = CASES["many"]._replace(all_terms=False)
CASES["one token of many"] = CASES["many"]._replace(
    hidden=CASES["many"].hidden[100:101], labels=CASES["many"].labels[100:101]
)


def run(program: str, folder: Path, *arguments: str) -> str:
    """What a program says that has Triton beside all that this process has."""
    python_with(_HERE / "triton-requirements.txt", _ENVIRONMENT)
    packages = sysconfig.get_path("purelib", "venv", {"base": str(_ENVIRONMENT)})
    done = subprocess.run(
        [sys.executable, str(_HERE / "triton_programs" / program), *arguments],
        env=os.environ | {"PYTHONPATH": packages, "TRITON_CACHE_DIR": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="session")  # of a module it would be made anew between others' tests
def terms_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Tensor, ...]]:
    """The terms of a case, by its name."""
    folder = tmp_path_factory.mktemp("triton")
    torch.save(
        [tuple(one._replace(projection=tuple(one.projection))) for one in CASES.values()],
        folder / "cases",
    )
    run("interpret.py", folder, str(folder / "cases"), str(folder / "terms"))
    found = dict(zip(CASES, torch.load(folder / "terms"), strict=True))
    return found.__getitem__


def naive_terms(one: Case) -> dict[str, Tensor]:
    """From the logits of the rounded product, with the label's own as float32 gives it."""
    weight, bias, *_ = one.projection
    hidden, labels = one.hidden.double(), one.labels[:, None]
    logits = one.hidden.to(one.dtype).double() @ weight.to(one.dtype).double().T + bias.double()
    own = (hidden * weight.double()[one.labels]).sum(-1, keepdim=True) + bias.double()[labels]
    logits = logits.scatter(1, labels, own)[:, bias > ABSENT]
    logprobs = logits.log_softmax(-1)
    exact = hidden @ weight.double().T + bias.double()
    return {
        "target_logprob": (own - logits.logsumexp(-1, keepdim=True))[:, 0],
        "mean_logprob": exact[:, bias > ABSENT].mean(-1) - logits.logsumexp(-1),
        "rank": (logits > own).sum(-1),
        "entropy": -(logprobs.exp() * logprobs).sum(-1),
    }


@pytest.mark.parametrize("name", [name for name, one in CASES.items() if one.all_terms])
def test_terms_are_those_of_all_logits(name: str, terms_of: Any) -> None:
    terms, expected = terms_of(name), naive_terms(CASES[name])
    size = 1 + expected["target_logprob"].abs().max()  # of the numbers that are subtracted
    for term, wanted in zip(terms, expected.values(), strict=True):
        assert term.dtype == (torch.int32 if wanted is expected["rank"] else torch.float32)
        torch.testing.assert_close(term.double(), wanted.double(), rtol=0, atol=float(2e-6 * size))
    assert (terms[0] <= 0).all()
    assert (terms[3] >= 0).all()


def test_a_small_loss_keeps_its_digits(terms_of: Any) -> None:
    """As a float32 has them, and not as a difference of two logits of 30 nats."""
    expected = naive_terms(CASES["sure"])["target_logprob"]
    assert (expected.abs() < 1e-6).all()
    logits = CASES["sure"].hidden.double() @ CASES["sure"].projection.weight.double().T
    logits = (logits + CASES["sure"].projection.bias.double()).clamp(min=ABSENT)
    others = torch.cat([logits[:, :7], logits[:, 8:]], dim=1).logsumexp(-1)
    nll = torch.log1p((others - logits[:, 7]).exp())
    torch.testing.assert_close(-terms_of("sure")[0].double(), nll, rtol=1e-4, atol=0)


def test_two_terms_are_the_first_of_four(terms_of: Any) -> None:
    two, four = terms_of("two terms"), terms_of("many")
    assert len(two) == 2
    assert all(map(torch.equal, two, four[:2]))


def test_a_token_has_the_same_terms_alone_and_among_many(terms_of: Any) -> None:
    """What is ours is, to the bit; how Torch sums up a label's logit is for itself."""
    for alone, among in zip(terms_of("one token of many"), terms_of("many"), strict=True):
        torch.testing.assert_close(alone, among[100:101], rtol=0, atol=1e-6)


def test_kernels_compile_to_tensor_cores(tmp_path: Path) -> None:
    made = json.loads(run("compile.py", tmp_path).splitlines()[-1])
    products = [one for one in made if one["kernel"] == "fold_classes"]
    for one in products:
        in_16_bits = one["types"]["states"] == "*bf16"
        instruction = {80: "mma.sync", 90: "wgmma"}[one["architecture"]]
        assert one["products"] == ([instruction] if in_16_bits else [])
        # What a program may have of an A100 and an H100.
        assert one["shared_bytes"] <= {80: 163, 90: 227}[one["architecture"]] * 1024
    assert len(products) == 10
    assert len(made) == 14


def test_nothing_is_compiled_for_a_batch_and_nothing_is_read_that_is_not_there(
    tmp_path: Path,
) -> None:
    found = json.loads(run("examine.py", tmp_path))
    assert found["variants"] == 1
    assert "do not belong together" in found["refusal"]


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name, one in CASES.items() if one.all_terms])
def test_a_gpu_gives_the_same_terms(name: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("there is no NVIDIA GPU")
    from seqloss.loss.triton_head import TritonHead  # noqa: PLC0415 - CPUs have no Triton

    one = CASES[name]
    head = TritonHead(OutputProjection(*(of.cuda() for of in one.projection[:4])), one.dtype)
    terms = head.terms(one.hidden.cuda(), one.labels.cuda(), with_ranks_and_entropies=True)
    expected = naive_terms(one)
    size = 1 + float(expected["target_logprob"].abs().max())
    for term, wanted in zip(terms, expected.values(), strict=True):
        torch.testing.assert_close(term.cpu().double(), wanted.double(), rtol=0, atol=5e-6 * size)
