"""Asks a service with NVIDIA's client for Triton, and prints what it says as JSON.

Runs where `tritonclient` is installed: python triton.py HOST:PORT < pairs.json
"""

from __future__ import annotations

import asyncio
import json
import sys
from itertools import chain
from typing import Any

import numpy as np
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

MODEL = "demo"
OUTPUTS = ("loss", "nll", "num_tokens", "error_code", "token_losses")


def inputs_of(
    pairs: dict[str, Any], dtype: type = np.int32, *, binary: bool = True, library: Any = triton
) -> list[Any]:
    inputs = []
    for side in ("source", "target"):
        rows = pairs[f"{side}_ids"]
        for name, values in (
            (f"{side}_ids", list(chain.from_iterable(rows))),
            (f"{side}_lengths", list(map(len, rows))),
        ):
            array = np.array(values, dtype)
            one = library.InferInput(name, list(array.shape), np_to_triton_dtype(dtype))
            one.set_data_from_numpy(array, binary_data=binary)
            inputs.append(one)
    return inputs


def outputs_of(*, binary: bool = True, library: Any = triton) -> list[Any]:
    return [library.InferRequestedOutput(name, binary_data=binary) for name in OUTPUTS]


def values(result: Any, names: tuple[str, ...] = OUTPUTS) -> dict[str, list[Any]]:
    return {name: result.as_numpy(name).tolist() for name in names}


def refused(ask: Any) -> dict[str, Any]:
    try:
        ask()
    except InferenceServerException as error:
        return {"status": error.status(), "message": error.message()}
    return {}


def ask(client: Any, pairs: dict[str, Any], bad: dict[str, Any]) -> dict[str, Any]:
    def infer(of: dict[str, Any] = pairs, **options: Any) -> Any:
        given = {"inputs": inputs_of(of), "outputs": outputs_of()} | options
        return client.infer(options.pop("model_name", MODEL), **given)

    said: dict[str, Any] = {
        "live": client.is_server_live(),
        "ready": client.is_server_ready(),
        "model ready": client.is_model_ready(MODEL),
        "version ready": client.is_model_ready(MODEL, "1"),
        "other ready": client.is_model_ready("other"),
        "server": client.get_server_metadata(),
        "metadata": client.get_model_metadata(MODEL),
        "config": client.get_model_config(MODEL, "1"),
        "index": client.get_model_repository_index(),
    }
    said["infer"] = {
        "binary": values(infer()),
        "version": values(infer(model_version="1")),
        "64 bits": values(infer(inputs=inputs_of(pairs, np.int64))),
        "JSON": values(
            infer(inputs=inputs_of(pairs, binary=False), outputs=outputs_of(binary=False))
        ),
        "JSON in": values(infer(inputs=inputs_of(pairs, binary=False))),
        "JSON out": values(infer(outputs=outputs_of(binary=False))),
        "options": values(
            infer(priority=2, timeout=60_000_000, parameters={"on_error": "partial"})
        ),
        "async": values(
            client.async_infer(MODEL, inputs_of(pairs), outputs=outputs_of()).get_result()
        ),
    }
    for algorithm in ("gzip", "deflate"):
        said["infer"] |= {
            f"{algorithm} request": values(infer(request_compression_algorithm=algorithm)),
            f"{algorithm} reply": values(infer(response_compression_algorithm=algorithm)),
        }
    said["default"] = values(client.infer(MODEL, inputs_of(pairs), request_id="mine"), OUTPUTS[:4])
    said["id"] = client.infer(MODEL, inputs_of(pairs), request_id="mine").get_response()["id"]
    partial = infer(bad, parameters={"on_error": "partial"})
    said["partial"] = values(partial)
    said["partial parameters"] = partial.get_response()["parameters"]
    said["statistics"] = client.get_inference_statistics(MODEL)
    said["refused"] = {
        "bad pair": refused(lambda: infer(bad)),
        "no lengths": refused(lambda: infer(inputs=inputs_of(pairs)[:1])),
        "unknown parameter": refused(lambda: infer(parameters={"label_smothing": 1})),
        "unknown model": refused(lambda: client.infer("other", inputs_of(pairs))),
        "unknown metadata": refused(lambda: client.get_model_metadata("other")),
    }
    return said


async def ask_asynchronously(address: str, pairs: dict[str, Any]) -> dict[str, Any]:
    async with triton_aio.InferenceServerClient(address) as client:
        return {
            algorithm or "plain": values(
                await client.infer(
                    MODEL,
                    inputs_of(pairs, library=triton_aio),
                    outputs=outputs_of(library=triton_aio),
                    request_compression_algorithm=algorithm,
                    response_compression_algorithm=algorithm,
                )
            )
            for algorithm in (None, "gzip", "deflate")
        }


def main() -> None:
    address, given = sys.argv[1], json.load(sys.stdin)
    with triton.InferenceServerClient(address) as client:
        said = ask(client, given["pairs"], given["bad"])
    said["aio"] = asyncio.run(ask_asynchronously(address, given["pairs"]))
    json.dump(said, sys.stdout)


if __name__ == "__main__":
    main()
