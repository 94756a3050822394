"""Bodies of the Open Inference Protocol, written down here apart from the code that reads them."""

from __future__ import annotations

import json
from itertools import chain
from typing import Any

import numpy as np

WIRE = {
    "BOOL": "?",
    "UINT8": "<u1",
    "INT8": "<i1",
    "INT32": "<i4",
    "INT64": "<i8",
    "FP32": "<f4",
    "FP64": "<f8",
}
HEADER_LENGTH = "Inference-Header-Content-Length"

# Fields of POST /loss that are tensors here, by what their rows are aligned with.
_ALIGNED = {"source_mask": "source", "target_mask": "target", "decoder_input_ids": "target"}
_PER_TARGET = ("source_index", "prefix_length", "decoder_start_token_id")


def tensor(name: str, values: Any, datatype: str = "INT32") -> dict[str, Any]:
    """An input with its entries, which `pack` writes as bytes or as JSON."""
    array = np.array(values, WIRE[datatype])
    return {"name": name, "datatype": datatype, "shape": list(array.shape), "data": array}


def tensors_of(
    body: dict[str, Any], datatype: str = "INT32", *, padded: bool = False
) -> list[dict[str, Any]]:
    """The inputs that say what the lists of a body of POST /loss say."""
    sides = {"source": body["source_ids"], "target": body["target_ids"]}
    tensors = []
    for side, rows in sides.items():
        tensors.append(tensor(f"{side}_ids", _flat(rows, padded=padded), datatype))
        tensors.append(tensor(f"{side}_lengths", [len(row) for row in rows], datatype))
    for name, side in _ALIGNED.items():
        if body.get(name) is not None:
            assert list(map(len, body[name])) == list(map(len, sides[side]))
            tensors.append(tensor(name, _flat(body[name], padded=padded), datatype))
    tensors += [
        tensor(name, body[name], datatype)
        for name in _PER_TARGET
        if isinstance(body.get(name), list)
    ]
    return tensors


def _flat(rows: list[list[int]], *, padded: bool) -> Any:
    if not padded:
        return list(chain.from_iterable(rows))
    longest = max(map(len, rows), default=0)
    padded_rows = [[*map(int, row), *[0] * (longest - len(row))] for row in rows]
    return np.reshape(padded_rows, (len(rows), longest))


def pack(
    tensors: list[dict[str, Any]],
    *,
    binary: bool = True,
    nested: bool = False,
    outputs: list[Any] | None = None,
    parameters: dict[str, Any] | None = None,
    **rest: Any,
) -> dict[str, Any]:
    """Keyword arguments for a client's `post`: headers and content."""
    described, data = [], b""
    for given in tensors:
        described.append({key: value for key, value in given.items() if key != "data"})
        values = given["data"]
        if binary:
            described[-1]["parameters"] = {"binary_data_size": values.nbytes}
            data += values.tobytes()
        else:
            described[-1]["data"] = (values if nested else values.reshape(-1)).tolist()
    request: dict[str, Any] = {"inputs": described} | rest
    if outputs is not None:
        request["outputs"] = [
            {"name": output} if isinstance(output, str) else output for output in outputs
        ]
    if parameters:
        request["parameters"] = parameters
    header = json.dumps(request).encode()
    headers = {"Content-Type": "application/octet-stream" if binary else "application/json"}
    if binary:
        headers[HEADER_LENGTH] = str(len(header))
    return {"content": header + data, "headers": headers}


def unpack(response: Any) -> dict[str, np.ndarray]:
    """The outputs of a reply by name."""
    assert response.status_code == 200, response.text
    length = response.headers.get(HEADER_LENGTH)
    content = response.content
    header = json.loads(content if length is None else content[: int(length)])
    rest = b"" if length is None else content[int(length) :]
    outputs = {}
    for output in header["outputs"]:
        dtype = WIRE[output["datatype"]]
        if "data" in output:
            values = np.array(output["data"], dtype)
        else:
            size = output["parameters"]["binary_data_size"]
            values, rest = np.frombuffer(rest[:size], dtype), rest[size:]
        outputs[output["name"]] = values.reshape(output["shape"])
    assert not rest
    return outputs
