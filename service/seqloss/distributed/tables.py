"""Arrow tables in, columns out; rows of ids never become Python objects."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from seqloss.errors import ConfigurationError, Fault, InvalidRequestError, RequestError
from seqloss.records import Ragged, RequestArrays, offsets_of
from seqloss.scorer import ScoredRequest
from seqloss.tokenization.encoder import EncodedPairs, TextEncoder, TextPairs

SCORE_COLUMNS = (
    "loss",
    "nll",
    "mean_loss",
    "perplexity",
    "num_tokens",
    "token_nlls",
    "error",
)

_GREATEST_ID = 2**63 - 1
# What a request may ask for, and nobody here.
_ASKS_FOR_MORE = ', or ask for "truncation": true'

# What a text is called that was encoded by itself.
_ALONE = re.compile(r"text 0 of (source|target)s|\b(source|target)s 0 to 0")

# What is wrong with a row, by the number of the row.
Errors = dict[int, str]


@dataclass(frozen=True, slots=True)
class PairColumns:
    """Which columns hold the pairs, and how they are to be read.

    Attributes:
        source: lists of integers, or texts.
        target: likewise.
        is_text: whether they are texts.
        source_language, target_language: of texts, as `POST /loss/text` takes them.
        prefix_length: ids at the beginning of each target that are fed and do not count.
    """

    source: str = "source_ids"
    target: str = "target_ids"
    is_text: bool = False
    source_language: str | None = None
    target_language: str | None = None
    prefix_length: int = 0

    def __post_init__(self) -> None:
        """Refuses what would silently be of no effect.

        Raises:
            ConfigurationError: there is such.
        """
        if self.is_text and self.prefix_length:
            raise ConfigurationError(
                "a prefix is of ids; of texts the tokenizer says how long it is: leave it out"
            )
        if not self.is_text and (self.source_language or self.target_language):
            raise ConfigurationError("languages are of texts, and these are ids; leave them out")

    def names(self, kept: Sequence[str] = ()) -> tuple[str, ...]:
        """All columns that are read, those to be kept among them."""
        return tuple(dict.fromkeys((self.source, self.target, *kept)))

    def require_in(self, schema: pa.Schema) -> None:
        """Refuses what cannot be read, before anything is scored.

        Raises:
            ConfigurationError: a column is not there, or not of the type that it should be.
        """
        for name in (self.source, self.target):
            if schema.names.count(name) != 1:
                several = "are several columns" if name in schema.names else "is no column"
                raise ConfigurationError(
                    f"there {several} {name!r}; these are: {', '.join(schema.names)}"
                )
            found = schema.field(name).type
            if not (_is_text(found) if self.is_text else _is_ids(found)):
                wanted = "texts" if self.is_text else "lists of integers"
                raise ConfigurationError(f"column {name!r} is {found} and must be {wanted}")

    def require_by(self, encoder: TextEncoder) -> None:
        """Refuses languages that the model has not, and texts where it has no tokenizer.

        Raises:
            ConfigurationError: so it is.
        """
        if self.is_text:
            try:
                encoder.encode(self.texts([], []), with_tokens=False)
            except InvalidRequestError as error:
                raise ConfigurationError(error.detail) from error

    def texts(self, sources: list[str], targets: list[str]) -> TextPairs:
        """Some pairs, in their languages."""
        return TextPairs(sources, targets, self.source_language, self.target_language)


def request_of(
    table: pa.Table, columns: PairColumns, encoder: TextEncoder
) -> tuple[RequestArrays, Errors]:
    """The pairs of a table, one per row, and what is wrong with rows that hold none.

    Such rows are in the request too, which has as many as the table; what comes of them means
    nothing.

    Args:
        table: with the columns, of the types that `PairColumns.require_in` wants.
        columns: where the pairs are.
        encoder: makes ids of texts.

    Raises:
        ConfigurationError: languages or tokenizers are not as the model wants them.
    """
    errors: Errors = {}
    if columns.is_text:
        pairs = _encoded(table, columns, encoder, errors)
        return _request(
            pairs.sources.ids, pairs.targets.ids, pairs.prefix_length, pairs.start_id
        ), errors
    source, target = (
        _ragged(table.column(name), name, errors) for name in (columns.source, columns.target)
    )
    return _request(source, target, columns.prefix_length, None), errors


def _request(
    sources: Ragged, targets: Ragged, prefix_length: int, start_id: int | None
) -> RequestArrays:
    num_pairs = len(targets)
    return RequestArrays(
        source_ids=sources,
        target_ids=targets,
        source_index=np.arange(num_pairs),
        source_mask=None,
        target_mask=None,
        decoder_input_ids=None,
        start_ids=None if start_id is None else np.full(num_pairs, start_id),
        prefix_lengths=np.full(num_pairs, prefix_length),
        pad_token_id=None,
        truncation=False,
    )


def _ragged(column: pa.ChunkedArray, name: str, errors: Errors) -> Ragged:
    """Lists of integers, one after the other, without a copy where they are int64 already."""
    lists = _one_array(column)
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy().astype(np.int64)
    offsets = offsets_of(lengths)
    values = pc.list_flatten(lists)
    for row in np.flatnonzero(lists.is_null().to_numpy(zero_copy_only=False)):
        errors.setdefault(int(row), f"null: column {name!r} is null")
    row_of_value = np.repeat(np.arange(len(lists)), lengths)
    if values.null_count:
        for place in np.unique(row_of_value[values.is_null().to_numpy(zero_copy_only=False)]):
            errors.setdefault(int(place), f"null: a token of column {name!r} is null")
        values = pc.fill_null(values, 0)
    if pa.types.is_uint64(values.type):  # 64 bits without a sign hold more
        fits = pc.less_equal(values, pa.scalar(_GREATEST_ID, pa.uint64()))
        for place in np.unique(row_of_value[~fits.to_numpy(zero_copy_only=False)]):
            errors.setdefault(int(place), f"wrong_type: a token of column {name!r} is above 2^63")
        values = pc.if_else(fits, values, pa.scalar(0, pa.uint64()))
    return Ragged(values.cast(pa.int64()).to_numpy(), offsets)


def _encoded(
    table: pa.Table, columns: PairColumns, encoder: TextEncoder, errors: Errors
) -> EncodedPairs:
    sources, targets = (
        _texts(table.column(name), name, errors) for name in (columns.source, columns.target)
    )

    def encoded(sources: list[str], targets: list[str]) -> EncodedPairs:
        return encoder.encode(columns.texts(sources, targets), with_tokens=False)

    columns.require_by(encoder)
    try:
        return encoded(sources, targets)
    except RequestError:  # of some text, and it does not say of which
        pass
    for place, (source, target) in enumerate(zip(sources, targets, strict=True)):
        try:
            encoded([source], [target])
        except RequestError as error:
            code = error.faults[0].code if error.faults else "not_encoded"
            errors.setdefault(place, f"{code}: {_ALONE.sub(_its_side, error.detail)}")
            sources[place] = targets[place] = ""
    return encoded(sources, targets)


def _its_side(found: re.Match[str]) -> str:
    return f"the {found[1] or found[2]}"


def _texts(column: pa.ChunkedArray, name: str, errors: Errors) -> list[str]:
    """Empty where there is none."""
    texts: list[str] = []
    for row, content in enumerate(_one_array(column.cast(pa.large_binary())).to_pylist()):
        text = ""
        if content is None:
            errors.setdefault(row, f"null: column {name!r} is null")
        else:
            try:
                text = content.decode()
            except UnicodeDecodeError as error:
                errors.setdefault(row, f"malformed_text: column {name!r} is not UTF-8: {error}")
        texts.append(text)
    return texts


def scores_of(
    scored: ScoredRequest, errors: Errors, *, with_tokens: bool, first_row: int = 0
) -> dict[str, pa.Array]:
    """Columns of scores, one entry per row of the table; null where a row has an error.

    Args:
        scored: of the request that `request_of` made.
        errors: of the rows that held no pair.
        with_tokens: whether there is a column of each token's nll.
        first_row: the number of the table's first row, where the table is a part of a file.

    Returns:
        `loss` and `nll` (float64, sums in nats), `mean_loss` and `perplexity` (float64),
        `num_tokens` (int64), maybe `token_nlls` (lists of float32, null where a token does not
        count), and `error` (text: a code, a colon and what is wrong; null where nothing is).
    """
    scores = scored.scores
    said = {int(fault.index or 0): _of_row(fault, first_row) for fault in scored.faults}
    said |= errors
    has_error = np.zeros(len(scores.nlls), np.bool_)
    has_error[list(said)] = True
    messages: list[str | None] = [None] * len(has_error)
    for row, message in said.items():
        messages[row] = message
    num_tokens = np.maximum(scores.num_tokens, 1)
    with np.errstate(over="ignore"):  # a float64 cannot hold every perplexity
        perplexities = np.exp(scores.nlls / num_tokens)
    columns = {
        "loss": pa.array(scores.losses, mask=has_error),
        "nll": pa.array(scores.nlls, mask=has_error),
        "mean_loss": pa.array(scores.losses / num_tokens, mask=has_error),
        "perplexity": pa.array(perplexities, mask=has_error),
        "num_tokens": pa.array(scores.num_tokens, mask=has_error),
    }
    if with_tokens:
        nlls = scores.token_nlls
        columns["token_nlls"] = pa.LargeListArray.from_arrays(
            nlls.offsets,
            pa.array(nlls.values, from_pandas=True),  # NaN is null
            mask=pa.array(has_error),
        )
    columns["error"] = pa.array(messages, pa.string())
    return columns


def _of_row(fault: Fault, first_row: int) -> str:
    """What is said of a request's pair, of a row: its number is another one, and it is not cut."""
    index = int(fault.index or 0)
    named = re.sub(
        rf"\b(source|target|pair) {index}\b", rf"the \1 of row {first_row + index}", fault.detail
    )
    return f"{fault.code}: {named.removesuffix(_ASKS_FOR_MORE)}"


def _one_array(column: pa.ChunkedArray) -> pa.Array:
    combined = column.combine_chunks()
    if isinstance(combined, pa.ChunkedArray):
        return pa.concat_arrays(combined.chunks)
    return combined


def _is_ids(found: pa.DataType) -> bool:
    is_list = (
        pa.types.is_list(found)
        or pa.types.is_large_list(found)
        or pa.types.is_fixed_size_list(found)
    )
    return bool(is_list and pa.types.is_integer(found.value_type))


def _is_text(found: pa.DataType) -> bool:
    return bool(pa.types.is_string(found) or pa.types.is_large_string(found))
