"""What is sent and what comes back, as flat NumPy arrays.

Dimension key: U sources, N targets of a request.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any, Literal, TypedDict, get_args

import numpy as np
from numpy.typing import NDArray

Int32Array = NDArray[np.int32]
Float64Array = NDArray[np.float64]

Smoothing = Literal["uniform", "uniform_excluding_target"]
OnError = Literal["fail", "partial"]
Priority = Literal["interactive", "bulk"]
PerToken = Literal["token_losses", "token_nlls", "token_ranks", "token_entropies"]


# ---------------------------------------------------------------- what is sent


@dataclass(frozen=True, slots=True, eq=False)
class Ragged:
    """Rows of different lengths, one after the other.

    Attributes:
        values: all rows' entries. Shape: (total,).
        lengths: how many of them each row has, integers. Shape: (rows,).

    Raises:
        TypeError: these are no arrays, or the lengths are no integers.
        ValueError: shapes, lengths and values contradict each other.
    """

    values: NDArray[Any]
    lengths: NDArray[Any]

    def __post_init__(self) -> None:
        for name, array in (("values", self.values), ("lengths", self.lengths)):
            if not isinstance(array, np.ndarray):
                raise TypeError(
                    f"Ragged: {name} is a {type(array).__name__} and must be a NumPy array; "
                    "Ragged.from_rows takes lists"
                )
            if array.ndim != 1:
                raise ValueError(f"Ragged: {name} has {array.ndim} dimensions and must have one")
        if self.lengths.dtype.kind not in "iu":
            raise TypeError(f"Ragged: lengths are {self.lengths.dtype}; they must be integers")
        if len(self.lengths) and self.lengths.min() < 0:
            row = int(self.lengths.argmin())
            raise ValueError(f"Ragged: row {row} has the length {self.lengths[row]}")
        total = int(self.lengths.sum(dtype=np.int64))
        if total != len(self.values):
            raise ValueError(
                f"Ragged: the lengths add up to {total}, and there are {len(self.values)} values"
            )

    @classmethod
    def from_rows(cls, rows: Rows, name: str = "rows") -> Ragged:
        """Flattens rows of integers: lists, one-dimensional arrays, or one array of two dimensions.

        Args:
            rows: nothing in them is rounded, cast or dropped.
            name: what error messages call them.

        Raises:
            TypeError: something is no row, or no integer; True and 1.0 are none.
            ValueError: an integer that 64 bits do not hold.
        """
        if isinstance(rows, Ragged):
            return rows
        if isinstance(rows, np.ndarray) and rows.ndim == 2:
            return cls(rows.reshape(-1), np.full(len(rows), rows.shape[1], np.int64))
        listed = list(_rows_of(rows, name))
        lengths = np.fromiter(map(len, listed), np.int64, len(listed))
        if listed and all(isinstance(row, np.ndarray) for row in listed):
            return cls(_joined(listed, name), lengths)
        flat = list(chain.from_iterable(listed))
        if not all(_is_integer_type(kind) for kind in set(map(type, flat))):
            _refuse_first_wrong(listed, name)
        try:
            return cls(np.array(flat, np.int64), lengths)
        except OverflowError:
            raise ValueError(
                f"{name}: {max(flat, key=abs)} is no id: 64 bits do not hold it"
            ) from None

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def offsets(self) -> NDArray[np.int64]:
        """Row i is `values[offsets[i]:offsets[i + 1]]`. Shape: (rows + 1,)."""
        offsets = np.zeros(len(self) + 1, np.int64)
        np.cumsum(self.lengths, out=offsets[1:])
        return offsets

    def rows(self) -> list[NDArray[Any]]:
        """Views of all rows, in order."""
        ends = self.offsets.tolist()
        return [self.values[start:end] for start, end in pairwise(ends)]


Rows = Ragged | NDArray[Any] | Sequence[Sequence[int] | NDArray[Any]]


def _rows_of(rows: Any, name: str) -> Iterable[Any]:
    if isinstance(rows, str | bytes) or not isinstance(rows, Iterable):
        raise TypeError(f"{name} is a {type(rows).__name__} and must be rows of ids")
    for place, row in enumerate(rows):
        if isinstance(row, np.ndarray) and row.ndim != 1:
            raise ValueError(f"row {place} of {name} has {row.ndim} dimensions and must have one")
        if not isinstance(row, Sequence | np.ndarray) or isinstance(row, str | bytes):
            raise TypeError(
                f"row {place} of {name} is a {type(row).__name__} and must be a list or an array "
                "of ids"
            )
        yield row


def _joined(rows: Sequence[NDArray[Any]], name: str) -> NDArray[Any]:
    for place, row in enumerate(rows):
        if row.dtype.kind not in "iu" and len(row):
            raise TypeError(f"row {place} of {name} is {row.dtype}; ids are integers")
    filled = [row for row in rows if len(row)]
    if not filled:
        return np.zeros(0, np.int64)
    joined = np.concatenate(filled)
    if joined.dtype.kind not in "iu":  # NumPy makes int64 and uint64 together floats
        raise TypeError(f"{name} mixes integers with and without a sign; use int64 for all")
    return joined


def _is_integer_type(kind: type) -> bool:
    return issubclass(kind, int | np.integer) and not issubclass(kind, bool)


def _refuse_first_wrong(rows: Iterable[Iterable[Any]], name: str) -> None:
    for place, row in enumerate(rows):
        for position, entry in enumerate(row):
            if not _is_integer_type(type(entry)):
                raise TypeError(
                    f"row {place} of {name} has {entry!r} at position {position}, a "
                    f"{type(entry).__name__}; ids are integers"
                )


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """The pairs of one request of a bulk run.

    Attributes:
        sources, targets: all strings, or all rows of token ids; a `Ragged` costs least.
        source_index: the source of each target; None where target i goes with source i.
    """

    sources: Rows | Sequence[str]
    targets: Rows | Sequence[str]
    source_index: Sequence[int] | NDArray[Any] | None = None

    @property
    def is_text(self) -> bool:
        """Whether these are strings."""
        for side in (self.sources, self.targets):
            if not isinstance(side, Ragged | np.ndarray) and len(side):
                return isinstance(side[0], str)
        return False

    def __len__(self) -> int:
        return len(self.targets)


IdPair = tuple[Sequence[int] | NDArray[Any], Sequence[int] | NDArray[Any]]
TextPair = tuple[str, str]
Pair = IdPair | TextPair


class Options(TypedDict, total=False):
    """`ScoringOptions` as keyword arguments."""

    label_smoothing: float
    smoothing: Smoothing
    per_token: Sequence[PerToken]
    on_error: OnError
    truncation: bool
    priority: Priority
    timeout: float | None
    reproducible: bool
    pad_token_id: int | None
    prefix_length: int | Sequence[int] | NDArray[Any]
    decoder_start_token_id: int | Sequence[int] | NDArray[Any] | None


@dataclass(frozen=True, slots=True, eq=False)
class ScoringOptions:
    """How pairs are scored.

    Attributes:
        label_smoothing: between 0 and 1; changes losses, never an nll.
        smoothing: `uniform` as PyTorch has it, `uniform_excluding_target` as fairseq has it.
        per_token: arrays per token to return; others are neither computed nor sent.
        on_error: `fail`: one bad pair fails the request, with all bad ones listed; `partial`: bad
            pairs are NaN and listed in `LossResult.errors`.
        truncation: cut what is too long and say how many tokens; else it is an error.
        priority: `bulk` lets interactive requests go first.
        timeout: seconds that all attempts may take together; the service knows of it. None: no
            deadline, and the client's own `timeout` for each attempt.
        reproducible: the same request gives the same bits, whatever else the service does.
        pad_token_id: target positions with this id do not count, and trailing source positions are
            not attended to.
        prefix_length: tokens at targets' beginnings that are fed and do not count; one or N.
        decoder_start_token_id: the decoder's first input, one or N; None: the model's own.
    """

    label_smoothing: float = 0.0
    smoothing: Smoothing = "uniform"
    per_token: Sequence[PerToken] = ()
    on_error: OnError = "fail"
    truncation: bool = False
    priority: Priority = "interactive"
    timeout: float | None = None
    reproducible: bool = False
    pad_token_id: int | None = None
    prefix_length: int | Sequence[int] | NDArray[Any] = 0
    decoder_start_token_id: int | Sequence[int] | NDArray[Any] | None = None

    def __post_init__(self) -> None:
        for name, kind in (("smoothing", Smoothing), ("on_error", OnError), ("priority", Priority)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(
                    f"{name} is {getattr(self, name)!r} and must be one of {_listed(kind)}"
                )
        if isinstance(self.per_token, str):
            raise TypeError(f"per_token is {self.per_token!r} and must be a list of names")
        unknown = [name for name in self.per_token if name not in get_args(PerToken)]
        if unknown:
            raise ValueError(f"per_token: there is no {unknown[0]!r}, only {_listed(PerToken)}")
        if self.timeout is not None and not 0 < self.timeout < float("inf"):
            raise ValueError(f"timeout is {self.timeout} and must be a number of seconds over 0")


def _listed(literal: Any) -> str:
    return ", ".join(get_args(literal))


# ---------------------------------------------------------------- what comes back


@dataclass(frozen=True, slots=True)
class PairError:
    """Why a target has no loss."""

    index: int
    code: str
    detail: str


@dataclass(frozen=True, slots=True)
class Aggregate:
    """The losses of a request as one number each, in nats; None where nothing counts."""

    loss: float
    nll: float
    num_tokens: int
    num_pairs: int
    mean_loss: float | None
    mean_pair_loss: float | None
    perplexity: float | None


@dataclass(frozen=True, slots=True)
class Usage:
    """What a request cost the service."""

    source_tokens: int
    target_tokens: int
    encoded_sources: int
    batches: int
    queue_ms: float
    compute_ms: float


Offsets = tuple[int, int] | None
"""Start and end of a token in characters of its string; None for a token that stands for none."""


@dataclass(frozen=True, slots=True)
class PairScore:
    """The score of one target; sums in nats.

    Attributes:
        loss, nll: NaN where there is an error.
        num_tokens: those that count; 0 where there is an error.
        error: why there is no loss, or None. Its index is the place in its request.
        token_losses, token_nlls, token_entropies: float32, NaN where a position does not count.
        token_ranks: int32, -1 where a position does not count. All four None unless asked for.
    """

    loss: float
    nll: float
    num_tokens: int
    error: PairError | None = None
    token_losses: NDArray[np.float32] | None = None
    token_nlls: NDArray[np.float32] | None = None
    token_ranks: Int32Array | None = None
    token_entropies: NDArray[np.float32] | None = None

    @property
    def mean_loss(self) -> float:
        """Per token; NaN where nothing counts."""
        return self.loss / self.num_tokens if self.num_tokens else float("nan")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LossResult:
    """The reply to a request: entry i of every array belongs to target i as it was sent.

    Attributes:
        model: the name of the model that scored.
        losses, nlls: sums over counted tokens, in nats, NaN where there is an error. Shape: (N,),
            float64.
        num_tokens: counted tokens, 0 where there is an error. Shape: (N,), int32.
        errors: why targets have no loss, by index; empty under `on_error="fail"`.
        aggregate: over the targets that were scored.
        usage: what the request cost.
        token_losses, token_nlls, token_entropies: float32, a row per target as it was sent, NaN
            where a position does not count; None unless asked for.
        token_ranks: int32, likewise, -1 where a position does not count.
        num_truncated_source_tokens, num_truncated_target_tokens: cut from each pair. Shape: (N,),
            int32; None without `truncation`.
        source_tokens, target_tokens: strings, a list per source and per target; None unless
            `loss_text` was asked for tokens.
        source_offsets, target_offsets: likewise, where the tokenizer has offsets.
        request_id: what the service's log calls the request.
    """

    model: str
    losses: Float64Array
    nlls: Float64Array
    num_tokens: Int32Array
    aggregate: Aggregate
    usage: Usage
    errors: tuple[PairError, ...] = ()
    token_losses: Ragged | None = None
    token_nlls: Ragged | None = None
    token_ranks: Ragged | None = None
    token_entropies: Ragged | None = None
    num_truncated_source_tokens: Int32Array | None = None
    num_truncated_target_tokens: Int32Array | None = None
    source_tokens: list[list[str]] | None = None
    target_tokens: list[list[str]] | None = None
    source_offsets: list[list[Offsets]] | None = None
    target_offsets: list[list[Offsets]] | None = None
    request_id: str | None = None

    def __len__(self) -> int:
        return len(self.losses)

    @property
    def mean_losses(self) -> Float64Array:
        """`losses / num_tokens`; NaN where nothing counts. Shape: (N,), float64."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return self.losses / self.num_tokens

    @property
    def perplexities(self) -> Float64Array:
        """`exp(nlls / num_tokens)`; NaN where nothing counts or a float64 cannot hold it."""
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            values = np.exp(self.nlls / self.num_tokens)
        return np.where(np.isfinite(values), values, np.nan)

    def pairs(self) -> Iterator[PairScore]:
        """An object per target, in order: handy, and slower than the arrays."""
        errors = {error.index: error for error in self.errors}
        rows = {
            name: ragged.rows()
            for name in get_args(PerToken)
            if (ragged := getattr(self, name)) is not None
        }
        sums = zip(self.losses.tolist(), self.nlls.tolist(), self.num_tokens.tolist(), strict=True)
        for index, (loss, nll, num_tokens) in enumerate(sums):
            per_token = {name: row[index] for name, row in rows.items()}
            yield PairScore(loss, nll, num_tokens, errors.get(index), **per_token)


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A served model.

    Attributes:
        name: what requests call it.
        state: `loading`, `ready`, `draining` or `failed`.
        family, checkpoint: what it was exported from.
        engine, device, precision: None while it is being loaded.
        bundle_digest: of the bundle's contents.
        source_vocabulary_size, target_vocabulary_size: ids lie below.
        pad_token_id, decoder_start_token_id: the model's own.
        max_source_tokens, max_target_tokens: longer ones are an error, or cut with `truncation`.
        details: all that the service says of it, `languages` and special ids among it.
    """

    name: str
    state: str
    family: str
    checkpoint: str
    engine: str | None
    device: str | None
    precision: str | None
    bundle_digest: str
    source_vocabulary_size: int
    target_vocabulary_size: int
    pad_token_id: int
    decoder_start_token_id: int
    max_source_tokens: int
    max_target_tokens: int
    details: Mapping[str, Any]
