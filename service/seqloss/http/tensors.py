"""Bodies of the Open Inference Protocol: JSON, and the data of tensors behind it; no I/O here.

A request is a JSON object, followed by the data of those inputs that have a `binary_data_size`, in
their order: little-endian, row by row, without gaps. `Inference-Header-Content-Length` says where
the JSON ends. All other inputs have their `data` in the JSON, flat or nested. Replies are the same.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Annotated, Any, Literal

import numpy as np
import orjson
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from seqloss.errors import Fault, InvalidRequestError, MalformedBodyError, RequestTooLargeError
from seqloss.http.schemas import StopAtFirst, parse_body
from seqloss.loss.reduce import Smoothing

# What each entry of a tensor is in a body. Booleans are bytes, 0 or 1.
DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype("u1"),
    "UINT8": np.dtype("u1"),
    "INT8": np.dtype("i1"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}

# A request has about fifty brackets and braces, and one for each row of data that is nested: ids,
# masks and decoder inputs.
_FEW_BRACKETS = 500
_NUM_NESTED = 5
# More than there are, so that one too many is called by its name.
_MOST_TENSORS = 30

_Dimension = Annotated[int, Field(ge=0, lt=2**31)]
_Int64 = Annotated[int, Field(ge=-(2**63), lt=2**63)]
_Natural = Annotated[int, Field(ge=0, lt=2**63)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class InputParameters(_Strict):
    """Where an input's data is."""

    binary_data_size: _Natural | None = Field(
        None, description="Bytes of the tensor behind the JSON; without it `data` has the entries."
    )


class InputTensor(_Strict):
    """An input; see GET /v2/models/{name} for those that there are."""

    name: str
    datatype: str
    shape: Annotated[list[_Dimension], StopAtFirst(), Field(min_length=1, max_length=2)]
    parameters: InputParameters | None = None
    data: list[Any] | None = Field(None, description="All entries, flat, or a list per row.")


class OutputParameters(_Strict):
    """How an output is sent."""

    binary_data: bool | None = Field(
        None, description="Behind the JSON, as bytes; without it as `binary_data_output` says."
    )


class RequestedOutput(_Strict):
    """An output to be sent."""

    name: str
    parameters: OutputParameters | None = None


class InferParameters(_Strict):
    """The options of a request; those of POST /loss, as far as they are no tensors here."""

    label_smoothing: float = Field(0.0, ge=0.0, le=1.0)
    smoothing: Smoothing = "uniform"
    pad_token_id: _Int64 | None = None
    prefix_length: _Natural | None = Field(None, description="Of all targets alike.")
    decoder_start_token_id: _Int64 | None = Field(None, description="Of all targets alike.")
    truncation: bool = False
    on_error: Literal["fail", "partial"] = "fail"
    reproducible: bool = False
    priority: int = Field(0, ge=0, le=2, description="0 and 1: interactive; 2: bulk.")
    timeout: _Natural = Field(
        0, description="Microseconds from the request's arrival; then 504. 0: as long as it takes."
    )
    binary_data_output: bool = Field(
        False, description="Outputs come as bytes, but for those that say otherwise."
    )
    sequence_id: Literal[0, ""] = Field(0, description="There are no sequences here.")
    sequence_start: Literal[False] = False
    sequence_end: Literal[False] = False


class InferRequest(_Strict):
    """Tensors to score."""

    id: str = Field("", description="Sent back.")
    model_name: str | None = Field(None, description="Must be that of the path.")
    model_version: str | None = Field(None, description="Must be that of the path.")
    parameters: InferParameters | None = None
    inputs: Annotated[list[InputTensor], StopAtFirst(), Field(max_length=_MOST_TENSORS)]
    outputs: (
        Annotated[list[RequestedOutput], StopAtFirst(), Field(max_length=_MOST_TENSORS)] | None
    ) = Field(None, description="Which to send; without it loss, nll, num_tokens and error_code.")

    @property
    def options(self) -> InferParameters:
        """The parameters that were sent, or the defaults."""
        return self.parameters or InferParameters()


def split_body(body: bytes, header_length: str | None) -> tuple[bytes, memoryview]:
    """The JSON of a body, and what stands behind it.

    Args:
        body: decompressed.
        header_length: what the header `Inference-Header-Content-Length` says, None without one.

    Raises:
        MalformedBodyError: it says something that cannot be.
    """
    if header_length is None:
        return body, memoryview(b"")
    # Ten digits are enough for any body, and few enough for `int`.
    if not (header_length.isascii() and header_length.isdecimal() and len(header_length) <= 10):
        raise MalformedBodyError("Inference-Header-Content-Length is not a number of bytes")
    length = int(header_length)
    if length > len(body):
        raise MalformedBodyError(
            f"Inference-Header-Content-Length is {length}, and the body has {len(body)} bytes"
        )
    return body[:length], memoryview(body)[length:]


def parse_infer_request(header: bytes, max_rows: int) -> InferRequest:
    """The JSON of a body to a request.

    Args:
        header: JSON.
        max_rows: the most rows that nested data may have.

    Raises:
        RequestTooLargeError: it has more lists than so many rows can have.
        MalformedBodyError: it is not JSON.
        InvalidRequestError: it is, and fields are unknown, missing or of the wrong kind.
    """
    if header.count(b"[") + header.count(b"{") > _NUM_NESTED * max_rows + _FEW_BRACKETS:
        raise RequestTooLargeError(
            f"the request has more than {max_rows} sources or targets; split it"
        )
    return parse_body(InferRequest, header)


def read_tensors(
    inputs: Sequence[InputTensor], binary: memoryview, datatypes: Mapping[str, Sequence[str]]
) -> dict[str, NDArray[Any]]:
    """The arrays of a request by name, each with the shape that it claims.

    Args:
        inputs: as the JSON has them.
        binary: what stands behind the JSON.
        datatypes: those that are taken, for each input that there is.

    Returns:
        Arrays of integers, read-only where they are views of the body. Booleans are 0 and 1 where
        they come as JSON, and any byte where they are binary.

    Raises:
        InvalidRequestError: an input is unknown, given twice, or of a datatype that is not taken.
        MalformedBodyError: data is missing, left over, or not what shape and datatype say.
    """
    _refuse_unknown(inputs, datatypes)
    tensors: dict[str, NDArray[Any]] = {}
    start = 0
    for place, tensor in enumerate(inputs):
        size = tensor.parameters.binary_data_size if tensor.parameters else None
        if (size is None) == (tensor.data is None):
            raise _malformed(
                tensor, place, "needs its entries either in `data` or in binary_data_size bytes"
            )
        if size is None:
            values = _json_values(tensor, place)
        else:
            values = _binary_values(tensor, place, binary[start:], size)
            start += size
        tensors[tensor.name] = values.reshape(tensor.shape)
    if start != len(binary):
        raise MalformedBodyError(
            f"{len(binary)} bytes follow the JSON, and the inputs' binary_data_size make {start}"
        )
    return tensors


def _refuse_unknown(inputs: Sequence[InputTensor], datatypes: Mapping[str, Sequence[str]]) -> None:
    counts = Counter(tensor.name for tensor in inputs)
    faults = []
    for place, tensor in enumerate(inputs):
        name, taken = tensor.name[:100], datatypes.get(tensor.name)
        if taken is None:
            detail = f"there is no input {name!r}; these are: {', '.join(datatypes)}"
            faults.append(Fault("unknown_tensor", detail, loc=("inputs", place, "name")))
        elif tensor.datatype not in taken:
            detail = f"{name} is {tensor.datatype[:100]!r}, and taken are {', '.join(taken)}"
            faults.append(Fault("wrong_datatype", detail, loc=("inputs", place, "datatype")))
        elif counts[tensor.name] > 1:
            detail = f"{name} is given {counts[tensor.name]} times"
            faults.append(Fault("duplicate_tensor", detail, loc=("inputs", place, "name")))
    if faults:
        raise InvalidRequestError("inputs are unknown, doubled or of the wrong datatype", faults)


def _binary_values(tensor: InputTensor, place: int, binary: memoryview, size: int) -> NDArray[Any]:
    dtype = DTYPES[tensor.datatype]
    needed = math.prod(tensor.shape) * dtype.itemsize
    if size != needed:
        raise _malformed(
            tensor,
            place,
            f"has a binary_data_size of {size}; {tensor.datatype} of shape {tensor.shape} is "
            f"{needed} bytes",
        )
    if size > len(binary):
        raise _malformed(tensor, place, f"needs {size} bytes, and {len(binary)} are left")
    return np.frombuffer(binary[:size], dtype)


def _json_values(tensor: InputTensor, place: int) -> NDArray[Any]:
    entries: list[Any] = tensor.data or []
    if len(tensor.shape) == 2 and entries and isinstance(entries[0], list):
        if not all(isinstance(row, list) and len(row) == tensor.shape[1] for row in entries):
            raise _malformed(tensor, place, f"has rows that are not of its shape {tensor.shape}")
        entries = list(chain.from_iterable(entries))
    if len(entries) != math.prod(tensor.shape):
        raise _malformed(tensor, place, f"has {len(entries)} entries for its shape {tensor.shape}")
    kind = bool if tensor.datatype == "BOOL" else int
    if set(map(type, entries)) - {kind}:
        what = "true and false" if kind is bool else "integers"
        raise _malformed(tensor, place, f"is {tensor.datatype}, and has other entries than {what}")
    limits = np.iinfo(DTYPES[tensor.datatype])
    if entries and not (limits.min <= min(entries) and max(entries) <= limits.max):
        raise _malformed(tensor, place, f"has entries that {tensor.datatype} cannot hold")
    return np.fromiter(entries, DTYPES[tensor.datatype], len(entries))


def _malformed(tensor: InputTensor, place: int, what: str) -> MalformedBodyError:
    detail = f"the input {tensor.name} {what}"
    return MalformedBodyError(
        detail, [Fault("malformed_tensor", detail, loc=("inputs", place, tensor.name))]
    )


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """An output as it is to be sent."""

    name: str
    datatype: str
    values: NDArray[Any]
    binary: bool


def encode_infer_reply(
    reply: Mapping[str, Any], outputs: Sequence[OutputTensor]
) -> tuple[bytes, int | None]:
    """A reply's body.

    Args:
        reply: all that it has beside its outputs; NumPy arrays are allowed.
        outputs: in the order in which they are to be sent.

    Returns:
        The body, and how long its JSON is; None where that is all of it.
    """
    described: list[dict[str, Any]] = []
    data = []
    for output in outputs:
        values = np.ascontiguousarray(output.values, DTYPES[output.datatype])
        tensor = {"name": output.name, "datatype": output.datatype, "shape": values.shape}
        if output.binary:
            described.append(tensor | {"parameters": {"binary_data_size": values.nbytes}})
            data.append(values.tobytes())
        else:
            described.append(tensor | {"data": values})
    header = orjson.dumps({**reply, "outputs": described}, option=orjson.OPT_SERIALIZE_NUMPY)
    return b"".join([header, *data]), len(header) if data else None
