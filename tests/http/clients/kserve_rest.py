"""Asks a service with KServe's client, and prints what it says as JSON.

Runs where `kserve` is installed: python kserve_rest.py HOST:PORT < pairs.json
"""

from __future__ import annotations

import asyncio
import json
import sys
from itertools import chain
from typing import Any

import httpx
import numpy as np
from kserve import InferenceRESTClient, InferInput, InferRequest
from kserve.inference_client import RESTConfig
from kserve.protocol.infer_type import RequestedOutput

MODEL = "demo"
OUTPUTS = ("loss", "nll", "num_tokens", "error_code", "token_losses")


def request_of(pairs: dict[str, Any], *, binary: bool, **options: Any) -> InferRequest:
    inputs = []
    for side in ("source", "target"):
        rows = pairs[f"{side}_ids"]
        for name, entries in (
            (f"{side}_ids", list(chain.from_iterable(rows))),
            (f"{side}_lengths", list(map(len, rows))),
        ):
            array = np.array(entries, np.int32)
            one = InferInput(name, list(array.shape), "INT32")
            one.set_data_from_numpy(array, binary_data=binary)
            inputs.append(one)
    outputs = [RequestedOutput(name, {"binary_data": binary}) for name in OUTPUTS]
    return InferRequest(MODEL, inputs, request_outputs=outputs, **options)


def values(response: Any) -> dict[str, list[Any]]:
    return {output.name: output.as_numpy().tolist() for output in response.outputs}


async def refused(asking: Any) -> dict[str, Any]:
    try:
        await asking
    except httpx.HTTPStatusError as error:
        return {"status": error.response.status_code, "error": error.response.json()["error"]}
    return {}


async def ask(base: str, pairs: dict[str, Any], bad: dict[str, Any]) -> dict[str, Any]:
    async with InferenceRESTClient(RESTConfig(protocol="v2")) as client:

        async def infer(request: InferRequest, model: str = MODEL) -> Any:
            return await client.infer(base, request, model_name=model)

        partial = {"parameters": {"on_error": "partial"}}
        return {
            "live": await client.is_server_live(base),
            "ready": await client.is_server_ready(base),
            "model ready": await client.is_model_ready(base, MODEL),
            "other ready": await client.is_model_ready(base, "other"),
            "infer": {
                "JSON": values(await infer(request_of(pairs, binary=False))),
                "binary": values(await infer(request_of(pairs, binary=True))),
                "options": values(
                    await infer(
                        request_of(
                            pairs, binary=True, parameters={"priority": 2, "timeout": 60_000_000}
                        )
                    )
                ),
            },
            "id": (await infer(request_of(pairs, binary=True, request_id="mine"))).id,
            "partial": values(await infer(request_of(bad, binary=True, **partial))),
            "refused": {
                "bad pair": await refused(infer(request_of(bad, binary=False))),
                "unknown model": await refused(infer(request_of(pairs, binary=True), "other")),
            },
        }


def main() -> None:
    given = json.load(sys.stdin)
    said = asyncio.run(ask(f"http://{sys.argv[1]}", given["pairs"], given["bad"]))
    json.dump(said, sys.stdout)


if __name__ == "__main__":
    main()
