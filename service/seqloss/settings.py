"""Every knob of the service; the only reader of the environment.

Each field is read from `SEQLOSS_<FIELD>`; `seqloss serve` has a flag for those that people change.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from seqloss.errors import ConfigurationError

_PREFIX = "SEQLOSS_"
# What seqloss-client reads, maybe on the same machine.
_OF_THE_CLIENT = "SEQLOSS_API_KEY"


def _split(value: Any) -> Any:
    """A text of words between commas; anything else as it is."""
    if not isinstance(value, str):
        return value
    return tuple(word for part in value.split(",") if (word := part.strip()))


def _known_device(name: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise ValueError(f"there is no device {name!r}: auto, cpu or cuda:N")
    return name


def _user_cache() -> Path:
    """Where a user's programs keep what can be made again (XDG Base Directory Specification).

    A user without a home has no such folder, and nothing is kept.
    """
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        folder = Path("/nonexistent")
    return folder / "seqloss"


USER_CACHE = _user_cache()


class Settings(BaseSettings):
    """Limits and sizes. Units stand in the names."""

    model_config = SettingsConfigDict(env_prefix=_PREFIX, frozen=True, extra="forbid")

    host: str = "127.0.0.1"
    """Where to listen. Only this machine by default: without `api_keys_file` everybody may ask."""

    port: int = Field(8000, ge=0, le=65535)

    admin_host: str = "127.0.0.1"
    """Where the second port listens. Nobody is asked for a key there: open it to probes, to
    Prometheus and to operators, and to nobody else."""

    admin_port: int | None = Field(None, ge=0, le=65535)
    """A second port for health, metrics, and `POST /admin/reload`. /metrics is then there alone.
    None: health and metrics are on the first one, and models are reloaded by SIGHUP only."""

    api_keys_file: Path | None = None
    """A TOML file of tenants: their keys, models, priorities and quotas (see docs/operating.md).
    None: everybody may ask for anything."""

    tls_certificate_file: Path | None = None
    """A PEM file with the certificate and those that vouch for it. None: HTTP in the clear, as it
    should be where a proxy in front ends TLS. The second port always is."""

    tls_key_file: Path | None = None
    """The certificate's private key, without a passphrase."""

    cors_origins: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)] = ()
    """Origins such as `https://scores.example.org` whose pages may ask from a browser; `*` is all.
    None by default: browsers then refuse what pages of other origins ask for."""

    log_format: Literal["text", "json"] = "text"
    """Of the log on standard error: lines for people, or a JSON object on each."""

    log_requests: bool = True
    """Whether each request has a line: id, tenant, counts and times, never ids, texts or keys. It
    takes some 30 microseconds. Health and metrics have none."""

    traces: bool = False
    """Whether requests are traced with OpenTelemetry (the extra `tracing`); the standard variables
    `OTEL_*` say where spans go."""

    device: Annotated[str, AfterValidator(_known_device)] = "auto"
    """`auto` (cuda:0 where there is one, else cpu), `cpu`, or `cuda:N`."""

    engine: Literal["auto", "torch", "onnx"] = "auto"
    """What runs models. `auto`: the first that the bundle has graphs for and that is installed."""

    precision: Literal["auto", "float32", "bfloat16", "float16", "int8"] = "auto"
    """Of matrix products. `auto`: the fastest that the device has in hardware and the bundle holds;
    int8, an approximation, only where the bundle holds nothing else.
    bfloat16 is some three times as fast as float32, and off by about 0.01 nats per token; sums,
    norms and softmaxes are float32 always. /models states what is served and its measured error."""

    threads: int | None = Field(None, ge=1)
    """CPU threads for matrix products. None: as many as the engine finds cores."""

    kernels: bool = True
    """Whether a Torch bundle on a CPU with AVX2 or AVX-512 runs on kernels that are compiled for
    it, at the first start, within seconds and beside the service, which answers meanwhile. They
    need a C++ compiler; without one Torch's own operators compute, more slowly."""

    cache_dir: Path = USER_CACHE
    """Where compiled kernels are kept. Nobody else may write there."""

    deterministic: bool = False
    """Whether a pair's loss must be the same bits whoever shares its batch. It is whenever the
    kernels compute, at no cost; this refuses to start where they cannot, and waits for them."""

    warm_up: bool = True
    """Whether batches at the corners of the budget are computed before the service is ready: their
    memory is proven to be there, and the first requests do not pay for what is made once. It takes
    about as long as ten batches; on a CPU, whose memory cannot be proven, as ten small ones."""

    max_batch_tokens: int = Field(4096, ge=16)
    """Tokens of a micro-batch, sources and targets together, with the padding of graphs that pad.
    More fill a GPU better; fewer
    let an interactive request wait less behind a bulk one, and bound the memory of hidden states
    and attention; the loss head's is bounded by itself. A single pair above it goes alone."""

    max_logits_bytes: int = Field(1024**3, ge=1024)
    """Memory of a batch's logits, for imported ONNX models only: all others hold one block of
    classes at a time. It lowers `max_batch_tokens` to what fits, at four copies of 4 bytes per
    class and token: to 2,000 tokens with 32,128 classes, to 260 with 256,206. More lets batches be
    as large as `max_batch_tokens` says, and on a small device they do not fit; a single pair goes
    alone whatever it needs, 16 KB per thousand classes and target token."""

    max_batch_pairs: int = Field(512, ge=1)
    """Targets of a micro-batch. Bounds the attention of very short pairs."""

    max_block_ms: float = Field(100.0, gt=0)
    """How long a batch of bulk pairs may take, by the measured cost model, while interactive
    requests come: a running batch is never broken off, so this is what one of them may have to
    wait. Less is kinder to them, and costs bulk throughput; without interactive requests in the
    last seconds it does not hold."""

    max_forward_seconds: float = Field(300.0, gt=0)
    """A batch that takes longer will never end: everybody who waits gets 503, and the process ends
    with an error for its supervisor to start it anew. Large models on few cores need more."""

    max_queue_tokens: int = Field(2_000_000, ge=1)
    """Source and target tokens admitted and not yet computed; beyond it requests get 429. At
    20,000 tokens a second (a small model on two cores) the default is 100 seconds of waiting and
    some 30 MB."""

    max_body_bytes: int = Field(32 * 1024 * 1024, ge=1024)
    """A request's body, as received and after decompression; beyond it 413. JSON takes about 5
    bytes per token, so the default holds some six million. Parsing holds up all other requests,
    on whatever thread it runs: about 0.01 s per MB."""

    max_pairs_per_request: int = Field(50_000, ge=1)
    """Targets, and sources, in one request; beyond it 413. Larger requests amortise parsing and
    share batches better; smaller ones can be retried more cheaply."""

    max_source_tokens: int = Field(4096, ge=1)
    """A source's length; what the model itself bounds holds as well. Attention is quadratic."""

    max_target_tokens: int = Field(4096, ge=1)
    """A target's length; what the model itself bounds holds as well."""

    streams: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)] = ()
    """Values of the header `X-Seqloss-Stream` that become a label of the loss histograms, such as
    `news,web`; all others count as `other`. Each costs some 40 time series per model."""

    drain_delay_seconds: float = Field(0.0, ge=0)
    """After SIGTERM, how long requests are still taken while readiness says 503 already: as long
    as load balancers need to notice."""

    drain_timeout_seconds: int = Field(30, ge=0)
    """After SIGTERM, how long admitted requests may take to finish."""

    receive_timeout_seconds: float = Field(60, gt=0)
    """How long a client may take to send a request's headers, then to send its body (beyond it
    408), and to take in its reply. Whoever is slower loses the connection. Shorter frees what
    hostile clients hold sooner; the default lets the largest body come at 5 Mbit/s."""


def load_settings(**given: Any) -> Settings:
    """Settings as given, else from the environment, else the defaults.

    Raises:
        ConfigurationError: a value is wrong, or a variable of the environment names no setting.
    """
    unknown = [
        name
        for name in os.environ
        if name.upper().startswith(_PREFIX)
        and name.upper() != _OF_THE_CLIENT
        and name[len(_PREFIX) :].lower() not in Settings.model_fields
    ]
    if unknown:
        raise ConfigurationError(
            f"the environment has {', '.join(sorted(unknown))}, and there is no such setting; "
            f"these are: {', '.join(Settings.model_fields)}"
        )
    try:
        return Settings(**given)
    except ValidationError as error:
        wrong = "; ".join(
            f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()
        )
        raise ConfigurationError(
            f"a setting, or its variable {_PREFIX}..., is wrong: {wrong}"
        ) from error
