"""Plays the service, and time, to conversations of the client: nothing here waits or connects."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from seqloss_client._steps import Attempt, Conversation, Lost, Pause, Reply, Timing


@dataclass
class FakeTime:
    """A clock that only pauses and attempts move.

    Attributes:
        now: seconds.
        luck: what chance says every time; 0 makes every backoff nothing, 1 the longest.
        seconds_per_attempt: how long each reply takes.
    """

    now: float = 1000.0
    luck: float = 1.0
    seconds_per_attempt: float = 0.0
    pauses: list[float] = field(default_factory=list)

    @property
    def timing(self) -> Timing:
        return Timing(lambda: self.now, lambda: self.now, lambda: self.luck)


@dataclass
class Talk:
    """What a conversation came to."""

    attempts: list[Attempt]
    result: Any = None
    error: Exception | None = None


def converse(
    conversation: Conversation[Any], outcomes: Iterable[Reply | Lost], time: FakeTime | None = None
) -> Talk:
    """Gives an outcome to each attempt in turn, and notes what is asked for.

    The attempt after the last outcome ends it, without a result.
    """
    time = time or FakeTime()
    answers, talk = iter(outcomes), Talk([])
    outcome: Reply | Lost | None = None
    try:
        while True:
            step = conversation.send(outcome)
            if isinstance(step, Pause):
                time.pauses.append(step.seconds)
                time.now += step.seconds
                outcome = None
            else:
                talk.attempts.append(step)
                time.now += time.seconds_per_attempt
                outcome = next(answers)
    except StopIteration as end:
        talk.result = end.value
    except Exception as error:
        talk.error = error
    return talk


def json_reply(status: int, body: Any, **headers: str) -> Reply:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Reply(status, named, json.dumps(body).encode())


def problem(status: int, code: str, **more: Any) -> Reply:
    """As the service sends it."""
    body = {"status": status, "code": code, "detail": f"what {code} means", "errors": []}
    return json_reply(status, body | more, x_request_id="r-1")


# Letters of the struct module; written down apart from the code under test.
_LETTERS = {"INT32": "i", "INT64": "q", "FP32": "f", "FP64": "d"}


def read_tensors(headers: Mapping[str, str], body: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """The JSON of a binary request, and its inputs as lists."""
    size = int(headers["Inference-Header-Content-Length"])
    head, rest = json.loads(body[:size]), body[size:]
    tensors = {}
    for tensor in head["inputs"]:
        (count,), letter = tensor["shape"], _LETTERS[tensor["datatype"]]
        data = rest[: tensor["parameters"]["binary_data_size"]]
        rest = rest[len(data) :]
        tensors[tensor["name"]] = list(struct.unpack(f"<{count}{letter}", data))
    assert not rest
    return head, tensors


def tensors_reply(outputs: Mapping[str, tuple[str, list[float]]], **parameters: Any) -> Reply:
    """A binary reply with these outputs, each a datatype and its entries."""
    described, data = [], b""
    for name, (datatype, values) in outputs.items():
        packed = struct.pack(f"<{len(values)}{_LETTERS[datatype]}", *values)
        described.append(
            {
                "name": name,
                "datatype": datatype,
                "shape": [len(values)],
                "parameters": {"binary_data_size": len(packed)},
            }
        )
        data += packed
    head = json.dumps(
        {"model_name": "fake", "parameters": parameters, "outputs": described}
    ).encode()
    headers = {"inference-header-content-length": str(len(head)), "x-request-id": "r-2"}
    return Reply(200, headers, head + data)


AGGREGATE = {
    "loss": 3.5,
    "nll": 3.25,
    "num_tokens": 4,
    "num_pairs": 1,
    "mean_loss": 0.875,
    "mean_pair_loss": 0.875,
    "perplexity": None,
}
USAGE = {
    "source_tokens": 5,
    "target_tokens": 4,
    "encoded_sources": 1,
    "batches": 1,
    "queue_ms": 0.5,
    "compute_ms": 2.0,
}

# What the service says of one pair.
GOOD = json_reply(
    200,
    {
        "model": "fake",
        "losses": [1.0],
        "nlls": [1.0],
        "num_tokens": [1],
        "errors": [],
        "aggregate": AGGREGATE,
        "usage": USAGE,
    },
)
