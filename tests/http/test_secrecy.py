"""Keys, token ids and texts stay between client and model: logs, traces, errors have none."""

from __future__ import annotations

import gzip
import json
import random
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from collector import Collector, collecting
from fakes import VOCABULARY_SIZE
from server import Server

KEY, WRONG_KEY = "canary-key-5f3a9c7e21", "canary-wrong-8d1b4e6f90"
WORDS = ("canaryfinch", "canaryheron", "canarywren")
NUM_REQUESTS = 300


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    with collecting() as collector:
        monkeypatch.setenv("SEQLOSS_TRACES", "true")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.address)
        yield collector


class Fuzzer:
    """Requests of every kind, most of them broken; remembers the ids that it sent in a row."""

    def __init__(self, seed: int, vocabulary_size: int) -> None:
        self._random = random.Random(seed)
        self._size = vocabulary_size
        self.rows: set[tuple[int, ...]] = set()

    def row(self) -> list[int]:
        """Long enough that no other numbers look like it."""
        row = [self._random.randrange(10, self._size) for _ in range(self._random.randint(5, 9))]
        self.rows.add(tuple(row))
        return row

    def words(self) -> str:
        return " ".join(self._random.sample(WORDS, 2))

    def request(self) -> tuple[str, dict[str, Any]]:
        draw = self._random
        path, body = draw.choice([self._ids, self._texts, self._tensors])()
        self._break(body)
        content: bytes = json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        kind = draw.random()
        if kind < 0.1:
            content = content[: draw.randrange(len(content))]
        elif kind < 0.2:
            at = draw.randrange(len(content))
            content = content[:at] + draw.choice([b'"', b"[", b"\xff", b"1e999"]) + content[at:]
        elif kind < 0.3:
            headers["Content-Encoding"] = draw.choice(["gzip", "br"])
            if headers["Content-Encoding"] == "gzip":
                content = gzip.compress(content)[: -draw.randint(1, 12)]
        elif kind < 0.35:
            headers["Content-Type"] = "text/plain"
        elif kind < 0.4:
            headers["Inference-Header-Content-Length"] = str(draw.randrange(len(content)))
        headers["X-API-Key"] = draw.choice([KEY] * 9 + [WRONG_KEY])
        if draw.random() < 0.05:
            headers["X-Request-ID"] = f"not taken over: {KEY}"
        return path, {"content": content, "headers": headers}

    def _ids(self) -> tuple[str, dict[str, Any]]:
        rows = [self.row() for _ in range(3)]
        index = {"source_index": [0, 0]}
        return "/loss", {"source_ids": rows[:1], "target_ids": rows[1:], **index}

    def _texts(self) -> tuple[str, dict[str, Any]]:
        return "/loss/text", {"sources": [self.words()], "targets": [self.words()]}

    def _tensors(self) -> tuple[str, dict[str, Any]]:
        inputs = []
        for side in ("source", "target"):
            row = self.row()
            for name, data in ((f"{side}_ids", row), (f"{side}_lengths", [len(row)])):
                inputs.append(
                    {"name": name, "datatype": "INT32", "shape": [len(data)], "data": data}
                )
        return "/v2/models/m/infer", {"inputs": inputs}

    def _break(self, body: dict[str, Any]) -> None:
        """Something, somewhere, is of the wrong kind, or too much, or has a wrong name."""
        draw = self._random
        name = draw.choice(list(body))
        match draw.randrange(8):
            case 0:
                body[name] = body[name][0]
            case 1:
                body[name] = [*body[name], draw.choice([None, 2.5, self.words(), [[]], -1])]
            case 2:
                body[draw.choice(["label_smothing", "prompt"])] = self.words()
            case 3:
                body["timeout_ms"] = draw.choice([0.001, -1, self.words()])
            case 4:
                body["model"] = draw.choice(["m", "other"])
            case 5:
                body["return"] = [draw.choice(["token_losses", "everything"])]
            case 6 if name.endswith("ids"):
                body[name] = [[*self.row(), 10**7]]
            case _:
                pass


def text_of(log: str, logger: str | None = None) -> str:
    """What lines say, without the numbers that belong there: of strings at any depth."""
    found = []
    for line in log.splitlines():
        parsed = orjson.loads(line)
        if logger is None or parsed["logger"] == logger:
            found += [value for value in parsed.values() if not isinstance(value, int | float)]
    return "\n".join(map(str, found))


def leaks(text: str, fuzzer: Fuzzer) -> list[str]:
    """Whatever of the canaries is in a text; of ids two in a row, however they are separated."""
    found = [word for word in (KEY, WRONG_KEY, *WORDS) if word in text]
    numbers = [int(one) for one in re.findall(r"(?<![\w.])\d{1,8}(?![\w.]\d|\w)", text)]
    follows = set(zip(numbers, numbers[1:], numbers[2:], strict=False))
    for row in fuzzer.rows:
        found += [str(part) for part in zip(row, row[1:], row[2:], strict=False) if part in follows]
    return found


def run(server: Server, fuzzer: Fuzzer) -> list[httpx.Response]:
    replies = []
    with server.client() as client:
        for _ in range(NUM_REQUESTS):
            path, request = fuzzer.request()
            replies.append(client.post(path, **request))
    server.process.send_signal(signal.SIGTERM)
    server.exit_status()
    return replies


@pytest.mark.parametrize("kind", ["model", "bug"])
def test_a_fuzzed_run_tells_nothing(
    collector: Collector,
    serve: Callable[..., Server],
    bundle_of: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    (tmp_path / "keys.toml").write_text(f'[tenants.canary]\nkeys = ["{KEY}"]')
    monkeypatch.setenv("SEQLOSS_API_KEYS_FILE", str(tmp_path / "keys.toml"))
    monkeypatch.setenv("SEQLOSS_LOG_FORMAT", "json")
    if kind == "model":
        bundle = bundle_of("demo")
        fuzzer = Fuzzer(1, bundle.manifest.vocabulary.source)
        server = serve(f"m={bundle.folder}", "--device", "cpu")
    else:  # tracebacks go to the log
        fuzzer = Fuzzer(2, VOCABULARY_SIZE - 2)
        server = Server.with_fault("bug", warm_up=False)
    replies = run(server, fuzzer)

    statuses = {reply.status_code for reply in replies}
    assert statuses >= ({200, 400, 401, 415, 422} if kind == "model" else {400, 401, 422, 500})
    assert len(fuzzer.rows) > NUM_REQUESTS / 2
    errors = [reply.text for reply in replies if not reply.is_success]
    assert not [found for text in errors for found in leaks(text, fuzzer)]
    assert len(server.log.splitlines()) > NUM_REQUESTS, "each request has a line"
    assert not leaks(text_of(server.log), fuzzer)
    assert len(collector.spans) > NUM_REQUESTS
    spans = "\n".join(map(str, collector.spans))
    assert not [word for word in (KEY, WRONG_KEY, *WORDS) if word.encode() in collector.bodies]
    assert not leaks(re.sub(r"(time_unix_nano|_id): .*", "", spans), fuzzer)


def test_what_would_leak_is_found() -> None:
    """The search is no better than what it finds."""
    fuzzer = Fuzzer(3, 5000)
    row = fuzzer.row()
    for text in (f"ids {row}", "ids " + " ".join(map(str, row)), f"x {KEY}", f"a {WORDS[0]}."):
        assert leaks(text, fuzzer)
    assert not leaks(f"target 1 has the id {row[0]} at position 3", fuzzer)
