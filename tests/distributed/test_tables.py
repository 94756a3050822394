"""Rows of a dataset become pairs, and their scores become columns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fake_texts import fake_text_bundle
from fakes import fake_bundle, fake_manifest
from seqloss.checking.check import check
from seqloss.distributed.json_lines import table_of
from seqloss.distributed.tables import PairColumns, request_of, scores_of
from seqloss.errors import ConfigurationError, Fault
from seqloss.records import LengthLimits, Ragged, Scores
from seqloss.scorer import ScoredRequest, Times, Usage
from seqloss.tokenization.encoder import TextEncoder

IDS, TEXTS = PairColumns(), PairColumns("source", "target", is_text=True)
NO_ENCODER = TextEncoder.of(fake_bundle())


def pairs(sources: Any, targets: Any) -> pa.Table:
    return pa.table({"source_ids": sources, "target_ids": targets})


def rows_of(ragged: Ragged) -> list[list[int]]:
    return [row.tolist() for row in ragged.rows()]


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.int64()),
        pa.list_(pa.int32()),
        pa.list_(pa.uint16()),
        pa.large_list(pa.int64()),
        pa.large_list(pa.uint64()),
    ],
)
def test_lists_of_any_integers_become_rows(kind: pa.DataType) -> None:
    sources, targets = [[1, 2, 3], [], [4]], [[5], [6, 7], [8]]
    table = pairs(pa.array(sources, kind), pa.array(targets, kind))
    request, errors = request_of(table, IDS, NO_ENCODER)
    assert rows_of(request.source_ids) == sources
    assert rows_of(request.target_ids) == targets
    assert request.source_ids.values.dtype == np.int64
    assert request.source_index.tolist() == [0, 1, 2]
    assert errors == {}


def test_lists_of_a_fixed_size_become_rows() -> None:
    kind = pa.list_(pa.int64(), 2)
    table = pairs(pa.array([[1, 2], [3, 4]], kind), pa.array([[5, 6], None], kind))
    request, errors = request_of(table, IDS, NO_ENCODER)
    assert rows_of(request.source_ids) == [[1, 2], [3, 4]]
    assert rows_of(request.target_ids) == [[5, 6], []]
    assert errors == {1: "null: column 'target_ids' is null"}


def test_slices_and_chunks_are_the_rows_that_they_show() -> None:
    whole = pairs([[1], [2, 2], [3], [4], [5, 5, 5]], [[6], [7], [8], [9], [10]])
    table = pa.concat_tables([whole.slice(1, 2), whole.slice(4, 1)])
    request, _ = request_of(table, IDS, NO_ENCODER)
    assert rows_of(request.source_ids) == [[2, 2], [3], [5, 5, 5]]
    assert rows_of(request.target_ids) == [[7], [8], [10]]


def test_an_empty_table_has_no_pairs() -> None:
    kind = pa.list_(pa.int64())
    request, errors = request_of(pairs(pa.array([], kind), pa.array([], kind)), IDS, NO_ENCODER)
    assert len(request.target_ids) == 0
    assert errors == {}


def test_nulls_are_errors_of_their_rows() -> None:
    table = pairs([[1], None, [2, None], [3]], [[4], [5], [6], None])
    request, errors = request_of(table, IDS, NO_ENCODER)
    assert len(request.target_ids) == 4
    assert errors == {
        1: "null: column 'source_ids' is null",
        2: "null: a token of column 'source_ids' is null",
        3: "null: column 'target_ids' is null",
    }


def test_prefixes_are_of_every_target() -> None:
    columns = PairColumns(prefix_length=1)
    request, _ = request_of(pairs([[1], [2]], [[3, 4], [5, 6]]), columns, NO_ENCODER)
    assert request.prefix_lengths.tolist() == [1, 1]


def test_ids_beyond_64_bits_are_errors_of_their_rows() -> None:
    kind = pa.list_(pa.uint64())
    table = pairs(pa.array([[1], [2, 2**63]], kind), pa.array([[3], [4]], kind))
    request, errors = request_of(table, IDS, NO_ENCODER)
    assert rows_of(request.source_ids)[0] == [1]
    assert errors == {1: "wrong_type: a token of column 'source_ids' is above 2^63"}


@pytest.mark.parametrize(
    ("columns", "schema", "message"),
    [
        (IDS, {"a": pa.int64()}, "no column 'source_ids'; these are: a"),
        (
            IDS,
            {"source_ids": pa.list_(pa.float64()), "target_ids": pa.list_(pa.int64())},
            "'source_ids' is list<.*double.*> and must be lists of integers",
        ),
        (
            IDS,
            {"source_ids": pa.string(), "target_ids": pa.list_(pa.int64())},
            "'source_ids' is string and must be lists of integers",
        ),
        (
            TEXTS,
            {"source": pa.string(), "target": pa.list_(pa.int64())},
            "'target' is list<.*int64.*> and must be texts",
        ),
    ],
)
def test_columns_that_cannot_be_read_are_refused(
    columns: PairColumns, schema: dict[str, pa.DataType], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        columns.require_in(pa.schema(schema))


def test_texts_become_the_ids_of_the_model_s_tokenizer(tmp_path: Path) -> None:
    encoder = TextEncoder.of(fake_text_bundle(tmp_path, ends=False))
    table = pa.table({"source": ["w1 w6", None], "target": ["w3", "w4 w5"]})
    request, errors = request_of(table, TEXTS, encoder)
    assert rows_of(request.source_ids) == [[1, 6], []]
    assert rows_of(request.target_ids) == [[3], [4, 5]]
    assert errors == {1: "null: column 'source' is null"}


def test_a_text_that_cannot_be_encoded_is_an_error_of_its_row(tmp_path: Path) -> None:
    encoder = TextEncoder.of(fake_text_bundle(tmp_path, ends=False))
    endless = "w1 " * 2_000_000
    table = pa.table({"source": ["w1", endless, "w3"], "target": ["w4", "w5", "w6"]})
    request, errors = request_of(table, TEXTS, encoder)
    assert rows_of(request.source_ids) == [[1], [], [3]]
    assert rows_of(request.target_ids) == [[4], [], [6]]
    assert list(errors) == [1]
    assert errors[1].startswith("too_long: ")


def test_a_text_that_is_not_utf_8_is_an_error_of_its_row(tmp_path: Path) -> None:
    encoder = TextEncoder.of(fake_text_bundle(tmp_path, ends=False))
    sources = pa.array([b"w1", b"w2 \xff", b"w3"]).cast(pa.string(), safe=False)
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"source": sources, "target": ["w4", "w5", "w6"]}), path)
    request, errors = request_of(pq.read_table(path), TEXTS, encoder)
    assert rows_of(request.source_ids) == [[1], [], [3]]
    assert list(errors) == [1]
    assert errors[1].startswith("malformed_text: column 'source' is not UTF-8: ")


@pytest.mark.parametrize("side", ["source", "target"])
def test_what_is_said_of_a_text_has_no_number_that_is_not_its_own(
    side: str, tmp_path: Path
) -> None:
    encoder = TextEncoder.of(fake_text_bundle(tmp_path, ends=False))
    texts = {"source": ["w1", "w2"], "target": ["w3", "w4"]}
    texts[side][1] = "w1 " * 2_000_000
    _, errors = request_of(pa.table(texts), TEXTS, encoder)
    assert errors[1].startswith(f"too_long: the {side} has 6000000 characters")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"is_text": True, "prefix_length": 1}, "a prefix is of ids"),
        ({"source_language": "de"}, "languages are of texts"),
        ({"target_language": "de"}, "languages are of texts"),
    ],
)
def test_what_would_have_no_effect_is_refused(columns: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        PairColumns(**columns)


def test_a_column_that_is_there_twice_is_refused() -> None:
    kind = pa.list_(pa.int64())
    schema = pa.schema([("source_ids", kind), ("source_ids", kind), ("target_ids", kind)])
    with pytest.raises(ConfigurationError, match="there are several columns 'source_ids'"):
        IDS.require_in(schema)


def test_a_language_that_the_model_has_not_ends_the_run(tmp_path: Path) -> None:
    encoder = TextEncoder.of(fake_text_bundle(tmp_path))
    columns = PairColumns("source", "target", is_text=True, target_language="tlh")
    with pytest.raises(ConfigurationError, match="target_language: the model is not told any"):
        request_of(pa.table({"source": ["w1"], "target": ["w2"]}), columns, encoder)


def scored(nlls: list[float], tokens: list[list[float]], *faults: Fault) -> ScoredRequest:
    rows = Ragged(
        np.array([nll for row in tokens for nll in row], np.float32),
        np.cumsum([0, *map(len, tokens)]),
    )
    numbers = np.array(nlls)
    nothing = np.zeros(len(nlls), np.int64)
    return ScoredRequest(
        Scores(
            losses=numbers + 0.5,
            nlls=numbers,
            num_tokens=np.array([len(row) for row in tokens]),
            token_losses=rows,
            token_nlls=rows,
        ),
        faults,
        nothing,
        nothing,
        Usage(0, 0, 0, 0, 0.0, 0.0),
        Times(0.0, [], 0.0),
    )


def test_scores_are_columns_and_errors_leave_them_null() -> None:
    nan = float("nan")
    columns = scores_of(
        scored(
            [3.0, nan, 5.0, nan],
            [[1.0, 2.0], [nan], [5.0, nan], [nan]],
            Fault("empty_source", "source 3 has no token", 3),
        ),
        {1: "null: column 'source_ids' is null"},
        with_tokens=True,
    )
    assert {name: column.to_pylist() for name, column in columns.items()} == {
        "loss": [3.5, None, 5.5, None],
        "nll": [3.0, None, 5.0, None],
        "mean_loss": [1.75, None, 2.75, None],
        "perplexity": [
            pytest.approx(4.4817, rel=1e-4),
            None,
            pytest.approx(12.1825, rel=1e-4),
            None,
        ],
        "num_tokens": [2, None, 2, None],
        "token_nlls": [[1.0, 2.0], None, [5.0, None], None],
        "error": [
            None,
            "null: column 'source_ids' is null",
            None,
            "empty_source: the source of row 3 has no token",
        ],
    }


@pytest.mark.parametrize(
    ("detail", "said"),
    [
        ("source 0 has no token that is attended to", "the source of row 700 has no token that"),
        (
            "target 0 has the id 99 at position 10, the",
            "the target of row 700 has the id 99 at position",
        ),
        ("pair 0 alone does not fit the device", "the pair of row 700 alone does not fit"),
        (
            "the model gave NaN or infinity for pair 0",
            "the model gave NaN or infinity for the pair of",
        ),
    ],
)
def test_an_error_names_the_row_of_the_file(detail: str, said: str) -> None:
    faults = scored([1.0], [[1.0]], Fault("some_code", detail, 0))
    (error,) = scores_of(faults, {}, with_tokens=False, first_row=700)["error"].to_pylist()
    assert error.startswith(f"some_code: {said}")


def test_errors_of_a_real_check_name_rows_and_advise_nothing_that_is_not_to_be_had() -> None:
    ids = Ragged.from_rows([[1], [1] * 99, [1]], np.int64)
    targets = Ragged.from_rows([[1], [1], [77]], np.int64)
    table = pairs(*(pa.array(rows_of(each)) for each in (ids, targets)))
    request, _ = request_of(table, IDS, NO_ENCODER)
    faults = check(request, fake_manifest(), LengthLimits(12, 12)).faults
    columns = scores_of(scored([1.0] * 3, [[1.0]] * 3, *faults), {}, with_tokens=False, first_row=7)
    assert [error and error.partition(": ")[2] for error in columns["error"].to_pylist()] == [
        None,
        "the source of row 8 has 99 tokens, and at most 12 are taken; shorten it",
        "the target of row 9 has the id 77 at position 0, the vocabulary has 50",
    ]


def test_lines_of_json_are_rows() -> None:
    lines = [
        b'{"source_ids": [1, 2], "target_ids": [3], "id": 7, "note": "a"}',
        b'{"source_ids": [], "target_ids": [4, 5], "id": "x", "note": {"b": 1}}',
    ]
    table, errors = table_of(lines, IDS, ["id", "note"])
    assert table.to_pydict() == {
        "source_ids": [[1, 2], []],
        "target_ids": [[3], [4, 5]],
        "id": ["7", "x"],
        "note": ["a", '{"b":1}'],
    }
    assert errors == {}


def test_columns_of_pairs_can_be_kept_as_they_are() -> None:
    table, _ = table_of([b'{"source_ids": [1], "target_ids": [2]}'], IDS, ["source_ids", "none"])
    assert table.to_pydict() == {"source_ids": [[1]], "target_ids": [[2]], "none": [None]}


@pytest.mark.parametrize(
    "number", ["340282366920938463463374607431768211455", "1.10", "[1, 2.50e3]", "-7", "true"]
)
def test_numbers_are_kept_digit_by_digit(number: str) -> None:
    """Another file may know a row by one."""
    line = f'{{"source_ids": [1], "target_ids": [2], "id": {number}}}'
    table, errors = table_of([line.encode()], IDS, ["id"])
    assert table.column("id").to_pylist() == [number.replace(" ", "")]
    assert errors == {}


def test_a_column_that_is_not_kept_may_be_nested_as_deeply_as_it_likes() -> None:
    line = f'{{"source_ids": [1], "target_ids": [2], "id": 1.5, "note": {"[" * 1000}{"]" * 1000}}}'
    table, errors = table_of([line.encode()], IDS, ["id"])
    assert table.column("id").to_pylist() == ["1.5"]
    assert errors == {}


@pytest.mark.parametrize("depth", [300, 1000])
def test_what_is_nested_too_deeply_to_be_kept_is_an_error_of_its_row(depth: int) -> None:
    good = b'{"source_ids": [1], "target_ids": [2], "note": [[]]}'
    deep = good.replace(b"[[]]", b"[" * depth + b"]" * depth)
    table, errors = table_of([good, deep], IDS, ["note"])
    assert table.column("note").to_pylist() == ["[[]]", None]
    assert errors == {1: "malformed_line: 'note' is nested too deeply to be kept"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "malformed_line: unexpected end of data, at character 1"),
        (b"", "malformed_line: "),
        (b"[1]", "malformed_line: it is no JSON object"),
        (b'{"target_ids": [1]}', "wrong_type: 'source_ids' is missing or null"),
        (b'{"source_ids": [1.0], "target_ids": [1]}', "wrong_type: 'source_ids' is not a list of"),
        (b'{"source_ids": [true], "target_ids": [1]}', "wrong_type: 'source_ids' is not a list of"),
        (b'{"source_ids": [null], "target_ids": [1]}', "wrong_type: 'source_ids' is not a list of"),
        (b'{"source_ids": [1], "target_ids": "1"}', "wrong_type: 'target_ids' is not a list of"),
        (
            b'{"source_ids": [9223372036854775808], "target_ids": [1]}',
            "wrong_type: 'source_ids' is not a list of 64-bit integers",
        ),
    ],
)
def test_what_is_wrong_with_a_line_is_said_of_it_alone(line: bytes, message: str) -> None:
    good = b'{"source_ids": [1], "target_ids": [2]}'
    table, errors = table_of([good, line, good], IDS, [])
    assert len(table) == 3
    assert table.column("source_ids").to_pylist()[::2] == [[1], [1]]
    assert list(errors) == [1]
    assert errors[1].startswith(message)


def test_a_text_that_is_none_is_an_error() -> None:
    _, errors = table_of([b'{"source": 1, "target": "a"}'], TEXTS, [])
    assert errors == {0: "wrong_type: 'source' is not a text"}
