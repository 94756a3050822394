"""Packed graphs that lie about their sizes, for kernels read memory as they are told.

Whatever is wrong ends in an error of the bundle. Attacks run in other processes, which those that
succeed take with them.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_hostile_bundles import PROGRAM, Program, change_json, graph_of, packed, unpacked

from sealing import reseal
from seqloss.bundle.manifest import BODY_GRAPH, MANIFEST_NAME, WEIGHTS_NAME
from seqloss.bundle.reader import Bundle

GRAPH = f"graphs/torch-float32/{BODY_GRAPH}"

# Prints, folder by folder, the error that whoever serves the bundle would see.  Kernels are
# required, since where they fail Torch's own operators would have a try.
LOAD = """
import sys
from pathlib import Path
from seqloss.bundle.reader import open_bundle
from seqloss.engines.loader import KernelOptions, load_engine
from seqloss.errors import SeqlossError
from seqloss.settings import USER_CACHE

how, *folders = sys.argv[1:]
kernels = KernelOptions(USER_CACHE, required=True) if how == "kernels" else KernelOptions(None)
for folder in folders:
    try:
        load_engine(open_bundle(Path(folder)), "cpu", "float32", kernels=kernels)
    except SeqlossError as error:
        print(f"{type(error).__name__}: {error}".replace(chr(10), " "), flush=True)
    except Exception as error:
        print(repr(error)[:200].replace(chr(10), " "), flush=True)
    else:
        print("loaded", flush=True)
"""

REFUSED = {"BundleError", "SelfTestError", "OutOfMemoryError"}

Attack = Callable[[Path], None]
# And a part of what is said of it.
Attacks = dict[str, tuple[Attack, str]]


@pytest.fixture
def folder(bundle_of: Callable[..., Bundle], tmp_path: Path) -> Path:
    """A copy of a real bundle whose sizes all have kernels, and each weight its own name."""
    folder = shutil.copytree(bundle_of("wide-marian").folder, tmp_path / "untouched")
    manifest = json.loads((folder / MANIFEST_NAME).read_bytes())
    weights = load_file(folder / WEIGHTS_NAME)
    for name, same in manifest["weight_aliases"].items():
        weights[name] = weights[same].clone()
    manifest["weight_aliases"] = {}
    save_file(weights, folder / WEIGHTS_NAME)
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest))
    reseal(folder)
    return folder


def attacked(folder: Path, attacks: Attacks) -> dict[str, Path]:
    """A copy of the bundle for each attack."""
    copies = {}
    for name, (attack, _) in attacks.items():
        copies[name] = shutil.copytree(folder, folder.with_name(name))
        attack(copies[name])
        reseal(copies[name])
    return copies


def outcomes(folders: dict[str, Path], how: str) -> dict[str, str]:
    """The error that each bundle ends in, or how the process did that loaded it."""
    left, found = dict(folders), {}
    while left:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", LOAD, how, *left.values()],
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )
        said = done.stdout.splitlines()
        if done.returncode:
            said.append(f"the process ends with {done.returncode}: {done.stderr[-200:]}")
        for name, one in zip(list(left), said, strict=False):
            found[name] = one
            del left[name]
    return found


def not_refused(found: dict[str, str], attacks: Attacks, how: str) -> dict[str, str]:
    """Those that ended in something else than an error for whoever loads a bundle.

    With kernels the error has to be the expected one; what Torch stumbles over is Torch's affair.
    """
    return {
        name: error
        for name, error in found.items()
        if error != "loaded"
        and (
            error.partition(":")[0] not in REFUSED
            or (how == "kernels" and attacks[name][1] not in error)
        )
    }


# ---------------------------------------------------------------- in the program


def node(program: Program, operator: str, index: int = 0) -> dict[str, Any]:
    target = f"torch.ops.seqloss.{operator}.default"
    found: dict[str, Any] = [one for one in graph_of(program)["nodes"] if one["target"] == target][
        index
    ]
    return found


def given(operator: str, index: int = 0, **arguments: Any) -> Attack:
    """Other arguments for one of the graph's operators."""

    def change(program: Program) -> None:
        inputs = {one["name"]: one for one in node(program, operator, index)["inputs"]}
        for name, argument in arguments.items():
            inputs[name]["arg"] = argument

    return in_program(change)


def in_program(change: Callable[[Program], None]) -> Attack:
    def attack(folder: Path) -> None:
        members = unpacked((folder / GRAPH).read_bytes())
        change_json(members, PROGRAM, change)
        (folder / GRAPH).write_bytes(packed(members))

    return attack


def called(target: str, operator: str, argument: str, **others: Any) -> Attack:
    """Puts `target` between an operator and one of its arguments."""

    def change(program: Program) -> None:
        graph = graph_of(program)
        at = node(program, operator)
        (mine,) = [one for one in at["inputs"] if one["name"] == argument]
        name = mine["arg"]["as_tensor"]["name"]
        graph["tensor_values"]["evil"] = graph["tensor_values"][name]
        arguments = {"self": {"as_tensor": {"name": name}}} | others
        made = {
            "target": f"torch.ops.aten.{target}",
            "inputs": [{"name": key, "arg": value, "kind": 1} for key, value in arguments.items()],
            "outputs": [{"as_tensor": {"name": "evil"}}],
            "metadata": {},
            "name": "evil",
            "is_hop_single_tensor_return": None,
        }
        graph["nodes"].insert(graph["nodes"].index(at), made)
        mine["arg"] = {"as_tensor": {"name": "evil"}}

    return in_program(change)


def rename_an_operator(program: Program) -> None:
    node(program, "linear")["target"] = "torch.ops.seqloss.system.default"


def number(value: int) -> dict[str, Any]:
    return {"as_int": value}


def tensor(name: str) -> dict[str, Any]:
    return {"as_tensor": {"name": name}}


def scalar_type(value: int) -> dict[str, Any]:
    return {"as_scalar_type": value}


SLICE = {"dim": number(0), "start": number(0), "end": number(1), "step": number(1)}
NARROW = SLICE | {"dim": number(1), "end": number(16)}
BYTE, INT64, HALF, FLOAT64, BFLOAT16 = map(scalar_type, (1, 5, 6, 8, 13))
META = {"device": {"as_device": {"type": "meta", "index": None}}, "dtype": scalar_type(7)}

# What is said of attacks where kernels compute.
TOGETHER = "do not belong together"
ATTENTION, PRODUCT, NORM = (
    f"{TOGETHER}: an attention",
    f"{TOGETHER}: a product",
    f"{TOGETHER}: a norm",
)
BIAS, RESIDUAL = f"{TOGETHER}: a bias", f"{TOGETHER}: a residual"
DTYPES, NORMS_WEIGHTS = f"{PRODUCT}'s dtypes", f"{NORM}'s weights"
ROWS = "sequences of rows that are not there"
DEVICE = "an argument of the kind 'as_device'"
NUMBERS = "its losses would be wrong"

SEQUENCES: Attacks = {
    # Sequences of rows that are not there, that overlap, or that are no sequences.
    "ends_for_starts": (given("attention", query_starts=tensor("source_ends")), ROWS),
    "starts_for_ends": (given("attention", query_ends=tensor("source_starts")), ROWS),
    "keys_from_ids": (given("attention", key_ends=tensor("source_ids")), ATTENTION),
    "targets_of_sources": (given("attention", query_ends=tensor("target_ends")), ATTENTION),
    "negative_starts": (called("neg.default", "attention", "key_starts"), ROWS),
    "negative_ends": (called("neg.default", "attention", "query_ends"), ROWS),
    "far_ends": (called("mul.Scalar", "attention", "key_ends", other=number(2**40)), ROWS),
    "fewer_bounds": (called("slice.Tensor", "attention", "key_ends", **SLICE), ATTENTION),
    "bounds_of_32_bits": (
        called("to.dtype", "attention", "key_ends", dtype=scalar_type(4)),
        ATTENTION,
    ),
    "bounds_of_two_dimensions": (
        called("unsqueeze.default", "attention", "key_ends", dim=number(1)),
        ATTENTION,
    ),
    "fewer_keys": (called("slice.Tensor", "attention", "keys", **SLICE), ATTENTION),
    "fewer_values": (called("slice.Tensor", "attention", "values", **SLICE), ATTENTION),
    "narrow_values": (called("slice.Tensor", "attention", "values", **NARROW), ATTENTION),
    "narrow_queries": (called("slice.Tensor", "attention", "queries", **NARROW), ATTENTION),
    "transposed_queries": (called("t.default", "attention", "queries"), ATTENTION),
    "queries_of_one_dimension": (
        called("view.default", "attention", "queries", size={"as_ints": [-1]}),
        "view size",
    ),
    # Heads that do not divide, and other settings.
    "no_heads": (given("attention", heads=number(0)), "modulo by zero"),
    "negative_heads": (given("attention", heads=number(-4)), "an attention's bias"),
    "heads_that_do_not_divide": (given("attention", heads=number(3)), "shape '[1, 48, 3, -1]'"),
    "heads_of_one": (given("attention", heads=number(64)), NUMBERS),
    "attention_to_bytes": (given("attention", dtype=BYTE), PRODUCT),
    "attention_to_halves": (given("attention", dtype=HALF), PRODUCT),
    "a_weight_as_a_bias": (
        given("attention", bias=tensor("p_encoder_layers_0_attention_norm_weight")),
        "an attention's bias",
    ),
    "an_input_as_a_bias": (
        given("attention", bias=tensor("source_ids")),
        "no attribute 'source_ids'",
    ),
    "queries_nowhere": (called("to.device", "attention", "queries", **META), DEVICE),
}
PRODUCTS_AND_NORMS: Attacks = {
    # Dtypes that outputs are not large enough for.
    "a_product_in_bytes": (given("linear", 0, dtype=BYTE), DTYPES),
    "a_product_in_halves": (given("linear", 0, dtype=HALF), DTYPES),
    "a_product_in_bfloat16": (given("linear", 0, dtype=BFLOAT16), DTYPES),
    "a_product_in_64_bits": (given("linear", 0, dtype=FLOAT64), DTYPES),
    "a_product_of_integers": (given("linear", 0, dtype=INT64), DTYPES),
    "a_norm_in_halves": (given("norm", 0, dtype=HALF), PRODUCT),
    "a_norm_in_bytes": (given("norm", 0, dtype=BYTE), PRODUCT),
    "inputs_of_16_bits": (called("to.dtype", "linear", "inputs", dtype=BFLOAT16), PRODUCT),
    "inputs_of_64_bits": (called("to.dtype", "linear_add", "inputs", dtype=FLOAT64), PRODUCT),
    "a_residual_of_16_bits": (
        called("to.dtype", "linear_add", "residual", dtype=BFLOAT16),
        RESIDUAL,
    ),
    "a_norm_of_16_bits": (called("to.dtype", "norm", "inputs", dtype=BFLOAT16), NORM),
    # Other sizes.
    "a_product_of_another_weight": (
        given("linear", 1, weight=tensor("p_encoder_layers_0_feed_forward_output_weight")),
        NUMBERS,
    ),
    "another_bias": (
        given("linear", 0, bias=tensor("p_encoder_layers_0_attention_norm_weight")),
        BIAS,
    ),
    "a_norm_as_a_weight": (
        given("linear", 0, weight=tensor("p_encoder_layers_0_attention_norm_weight")),
        "Dimension out of range",
    ),
    "a_matrix_as_a_norm": (
        given("norm", 0, weight=tensor("p_encoder_layers_0_feed_forward_output_weight")),
        "to be of same shape",
    ),
    "a_long_bias_of_a_norm": (
        given("norm", 0, bias=tensor("p_encoder_layers_0_attention_qkv_bias")),
        NORMS_WEIGHTS,
    ),
    "a_narrow_input": (called("slice.Tensor", "linear", "inputs", **NARROW), PRODUCT),
    "fewer_residuals": (called("slice.Tensor", "linear_add", "residual", **SLICE), RESIDUAL),
    # A row of each would be as large as the weight says.
    "an_input_of_one_dimension": (
        called("view.default", "linear", "inputs", size={"as_ints": [-1]}),
        PRODUCT,
    ),
    # Memory that is on no device.
    "inputs_nowhere": (called("to.device", "linear", "inputs", **META), DEVICE),
    "a_residual_nowhere": (called("to.device", "linear_add", "residual", **META), DEVICE),
    "a_norm_nowhere": (called("to.device", "norm", "inputs", **META), DEVICE),
    # What there is not.
    "an_unknown_operator": (
        in_program(rename_an_operator),
        "not an operator that a bundle may use",
    ),
    "an_unknown_activation": (given("linear", 0, activation={"as_string": "system"}), "'system'"),
    "no_weight": (given("linear", 0, weight={"as_none": True}), "has no attribute 'target'"),
}


# Torch's own operators compute what they are asked for.
HARMLESS_WITHOUT_KERNELS = {"a_product_in_64_bits", "bounds_of_32_bits"}


def test_the_untouched_bundle_loads(folder: Path, kernel_library: Any) -> None:
    assert outcomes({"untouched": folder}, "kernels") == {"untouched": "loaded"}


@pytest.mark.parametrize("how", ["kernels", "torch"])
@pytest.mark.parametrize("attacks", [SEQUENCES, PRODUCTS_AND_NORMS], ids=["attention", "others"])
def test_a_program_that_lies_is_refused(
    attacks: Attacks, how: str, folder: Path, kernel_library: Any
) -> None:
    found = outcomes(attacked(folder, attacks), how)
    loaded = {name for name, error in found.items() if error == "loaded"}
    assert loaded == (HARMLESS_WITHOUT_KERNELS & found.keys() if how == "torch" else set())
    assert not_refused(found, attacks, how) == {}


# ---------------------------------------------------------------- in the weights


def with_weights(change: Callable[[dict[str, torch.Tensor]], None]) -> Attack:
    def attack(folder: Path) -> None:
        weights = load_file(folder / WEIGHTS_NAME)
        change(weights)
        save_file(weights, folder / WEIGHTS_NAME)

    return attack


def resized(name: str, *shape: int) -> Attack:
    """A weight, or one of the output projection, which no program speaks of."""

    def change(weights: dict[str, torch.Tensor]) -> None:
        assert name in weights
        weights[name] = torch.zeros(shape)

    return with_weights(change)


def resized_in_both(name: str, *shape: int) -> Attack:
    """And the program says so too."""

    def change(program: Program) -> None:
        described = graph_of(program)["tensor_values"][f"p_{name.replace('.', '_')}"]
        described["sizes"] = [number(size) for size in shape]

    def attack(folder: Path) -> None:
        in_program(change)(folder)
        resized(name, *shape)(folder)

    return attack


def more_classes(folder: Path) -> None:
    """The manifest says that there are classes which the output projection has no rows for."""
    manifest = json.loads((folder / MANIFEST_NAME).read_bytes())
    manifest["vocabulary"]["classes"] = 50_000_000
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest))


QKV, ATTENTION_NORM = "encoder.layers.0.attention.qkv", "encoder.layers.0.attention_norm"
OUTPUT = f"the output projection has sizes that {TOGETHER}"
CLASSES = "and its output projection has"
IN_THE_WEIGHTS: Attacks = {
    "another_product_than_the_program_says": (
        resized(f"{QKV}.weight", 176, 64),
        "the graph takes [192, 64]",
    ),
    "a_product_of_fewer_rows": (resized_in_both(f"{QKV}.weight", 176, 64), BIAS),
    "a_product_of_more_rows": (resized_in_both(f"{QKV}.weight", 208, 64), BIAS),
    "a_product_of_fewer_columns": (resized_in_both(f"{QKV}.weight", 192, 32), PRODUCT),
    "a_product_of_more_columns": (resized_in_both(f"{QKV}.weight", 192, 128), PRODUCT),
    "a_product_of_nothing": (resized_in_both(f"{QKV}.weight", 192, 0), PRODUCT),
    "a_product_of_no_rows": (resized_in_both(f"{QKV}.weight", 0, 64), BIAS),
    "a_product_of_three_dimensions": (
        resized_in_both(f"{QKV}.weight", 192, 64, 1),
        "reorder primitive",
    ),
    "a_short_bias": (resized_in_both(f"{QKV}.bias", 16), BIAS),
    "a_long_bias": (resized_in_both(f"{QKV}.bias", 4096), BIAS),
    "a_bias_of_two_dimensions": (resized_in_both(f"{QKV}.bias", 192, 1), BIAS),
    "a_short_norm": (resized_in_both(f"{ATTENTION_NORM}.weight", 48), NORMS_WEIGHTS),
    "a_norm_of_nothing": (resized_in_both(f"{ATTENTION_NORM}.weight", 0), NORMS_WEIGHTS),
    "a_short_norms_bias": (resized_in_both(f"{ATTENTION_NORM}.bias", 16), NORMS_WEIGHTS),
    "a_projection_of_fewer_classes": (resized("output.weight", 50, 64), CLASSES),
    "a_projection_of_no_classes": (resized("output.weight", 0, 64), CLASSES),
    "a_narrow_projection": (resized("output.weight", 101, 32), OUTPUT),
    "a_short_bias_of_classes": (resized("output.bias", 16), OUTPUT),
    "a_short_mean_weight": (resized("output.mean_weight", 16), OUTPUT),
    "no_mean_bias": (resized("output.mean_bias", 0), OUTPUT),
    "fewer_embeddings": (resized_in_both("decoder.embeddings", 50, 64), "index out of range"),
    "more_classes_than_there_are": (more_classes, CLASSES),
}


@pytest.mark.parametrize("how", ["kernels", "torch"])
def test_weights_of_other_sizes_are_refused(how: str, folder: Path, kernel_library: Any) -> None:
    found = outcomes(attacked(folder, IN_THE_WEIGHTS), how)
    assert not_refused(found, IN_THE_WEIGHTS, how) == {}
    assert "loaded" not in found.values()
