"""`seqloss-client score`: hostile lines, wrong commands, pipes, and what people are told."""

from __future__ import annotations

import gzip
import io
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import httpx
import pytest

from score_runs import CLIENT, WRITERS, Corpus, demo_corpus, score, start_score
from seqloss.bundle.reader import Bundle
from seqloss_client.corpus.lines import MAX_LINE_BYTES, LineSource
from seqloss_client.corpus.progress import ProgressDisplay
from server import Server

_CORPORA = Path(__file__).parents[3] / "shared" / "corpora"
_SMALL = ("--pairs-per-request", "4", "--score", "nll")


@pytest.fixture(scope="module")
def url(bundle_of: Callable[[str], Bundle]) -> Iterator[str]:
    """The demo model behind a service."""
    server = Server(f"demo={bundle_of('demo').folder}")
    yield server.address
    server.process.kill()
    server.process.communicate()


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    """A little of what the demo model knows."""
    return demo_corpus(12)


def _nll(url: str, source: str, target: str) -> float:
    """Of a pair alone, as the service says."""
    body = {"sources": [source], "targets": [target], "tokens": False}
    nll: float = httpx.post(f"{url}/loss/text", json=body).json()["nlls"][0]
    return nll


def _report(output: Path) -> dict[int, str]:
    """Codes by line."""
    lines = output.with_name(output.name + ".errors.jsonl").read_text().split("\n")[:-1]
    faults = [json.loads(line) for line in lines]
    assert all(fault["detail"] for fault in faults)
    assert [fault["line"] for fault in faults] == sorted(fault["line"] for fault in faults)
    return {fault["line"]: fault["code"] for fault in faults}


def _scores(output: Path) -> list[float]:
    return [float(line) for line in output.read_text().split("\n")[:-1]]


def _bad_lines(scores: list[float]) -> set[int]:
    """Line numbers of those that are NaN."""
    return {number for number, score in enumerate(scores, 1) if math.isnan(score)}


# ---------------------------------------------------------------- hostile lines


def test_hostile_lines_of_parallel_files_shift_nothing(url: str, tmp_path: Path) -> None:
    good = (b">>de<< May 5, 2026", b"5. Mai 2026")
    rows = [
        good,
        (b"caf\xe9", b"latin 1"),
        (b"a\x0bb\x0cc\x1cd\x1ee\xc2\x85f\xe2\x80\xa8g\xe2\x80\xa9h", b"no line ends"),
        (b"carriage return\r", b"one \r inside"),
        (b"", b""),
        (b"nul\x00", b"\xef\xbb\xbfmark in the middle"),
        (b"x" * (MAX_LINE_BYTES + 1), b"too long"),
        (b"too long", b"y" * (3 * MAX_LINE_BYTES)),
        (b"half a character \xe2\x82", b"z"),
        good,
    ]
    source, target, output = tmp_path / "s", tmp_path / "t", tmp_path / "scores"
    source.write_bytes(b"\xef\xbb\xbf" + b"\n".join(row[0] for row in rows))
    target.write_bytes(b"\n".join(row[1] for row in rows) + b"\n")
    arguments = ("--source", source, "--target", target, "--output", output, *_SMALL)
    assert score(url, *arguments) == 0
    scores = _scores(output)
    assert len(scores) == len(rows)
    assert scores[0] == pytest.approx(_nll(url, *(side.decode() for side in good)), rel=1e-5)
    assert scores[0] == pytest.approx(scores[-1], rel=1e-5)
    assert scores[3] == pytest.approx(_nll(url, "carriage return", "one \r inside"), rel=1e-5)
    report = _report(output)
    assert _bad_lines(scores) == set(report)
    assert report[2] == report[9] == "not_utf8"
    assert report[7] == report[8] == "line_too_long"
    assert not {1, 3, 4, 6, 10} & set(report)


def test_hostile_rows_of_columns_shift_nothing(url: str, corpus: Corpus, tmp_path: Path) -> None:
    lines: list[str | bytes] = ["\t".join(row) for row in corpus.texts]
    lines[2] = "one column"
    lines[3] = "\t".join([*corpus.texts[3], "a third"])
    lines[5] = ""
    lines[7] = b"\xff\t" + lines[7].encode()  # type: ignore[union-attr]
    path, output = tmp_path / "pairs.tsv", tmp_path / "scores"
    path.write_bytes(b"".join(_encoded(line) + b"\r\n" for line in lines))
    assert score(url, "--input", path, "--output", output, *_SMALL) == 0
    scores = _scores(output)
    assert len(scores) == len(lines)
    assert _report(output) == {
        3: "ragged_row",
        4: "ragged_row",
        6: "ragged_row",
        8: "not_utf8",
    }
    assert _bad_lines(scores) == {3, 4, 6, 8}
    assert scores[4] == pytest.approx(_nll(url, *corpus.texts[4]), rel=1e-5)


def _encoded(line: str | bytes) -> bytes:
    return line if isinstance(line, bytes) else line.encode()


def test_hostile_rows_of_csv_shift_nothing(url: str, tmp_path: Path) -> None:
    rows = [
        "source,target,number",
        '"a, b","say ""c""",1',
        'open "quote,x,2',
        '"open quote,x,3',
        '"closed" late,x,4',
        "two,columns",
        "last,one,6",
    ]
    path, output = tmp_path / "pairs.csv", tmp_path / "scores"
    path.write_text("\n".join(rows))
    arguments = ("--input", path, "--header", "--output", output, *_SMALL)
    assert score(url, *arguments) == 0
    # The header is line 1.
    assert _report(output) == {4: "malformed_csv", 5: "malformed_csv", 6: "ragged_row"} | (
        {3: "malformed_csv"} if 3 in _report(output) else {}
    )
    scores = _scores(output)
    assert scores[0] == pytest.approx(_nll(url, "a, b", 'say "c"'), rel=1e-5)
    assert scores[5] == pytest.approx(_nll(url, "last", "one"), rel=1e-5)


def test_hostile_rows_of_jsonl_shift_nothing(url: str, tmp_path: Path) -> None:
    good = '{"source": "a\\nb", "target": "c"}'
    rows = [
        good,
        "",
        "{",
        "[1, 2]",
        '{"source": "a"}',
        '{"source": "a", "target": null}',
        '{"source": "a", "target": 5}',
        '{"source": "\\ud800", "target": "b"}',
        '{"source": "a", "target": ["b"]}',
        good,
    ]
    path, output = tmp_path / "pairs.jsonl", tmp_path / "scores"
    path.write_text("\n".join(rows))
    assert score(url, "--input", path, "--output", output, *_SMALL) == 0
    assert _report(output) == {
        2: "malformed_json",
        3: "malformed_json",
        4: "wrong_type",
        5: "missing_column",
        6: "wrong_type",
        7: "wrong_type",
        8: "malformed_json",
        9: "wrong_type",
    }
    scores = _scores(output)
    assert len(scores) == len(rows)
    assert scores[0] == pytest.approx(_nll(url, "a\nb", "c"), rel=1e-5)


def test_hostile_ids_shift_nothing(url: str, corpus: Corpus, tmp_path: Path) -> None:
    source, target = (" ".join(map(str, ids)) for ids in corpus.ids[0])
    codes = {
        f"{source}\t{target}": None,
        f"{source}\t {target}  ": None,
        f"[{source.replace(' ', ', ')}]\t{target}": None,
        f"{source}\t{target} x": "malformed_ids",
        f"{source}\t1.5": "malformed_ids",
        f"{source}\t1-2": "malformed_ids",
        f"{source}\t- 2": "malformed_ids",
        f"{source}\t-": "malformed_ids",
        f"{source}\t+2": "malformed_ids",
        f"{source}\t1_0": "malformed_ids",
        f"{source}\t٣": "malformed_ids",
        f"{source}\t99999999999": "malformed_ids",
        f"{source}\t9999999999999999999999999": "malformed_ids",
        f"{source}\t[1, 2": "malformed_ids",
        f"{source}\t[1, true]": "malformed_ids",
        f"{source}\t[1, [2]]": "malformed_ids",
        f"{source}\t[1.0]": "malformed_ids",
        f"{source}\t[99999999999]": "malformed_ids",
        f"{source}\t{{}}": "malformed_ids",
        f"{source}\t": "empty_target",
        f"\t{target}": "empty_source",
        f"{source}\t[]": "empty_target",
        f"{source}\t2000000000": "token_out_of_range",
        f"{source}\t-5": "token_out_of_range",
    }
    for has_json in (True, False):
        lines = [line for line in codes if has_json or "[" not in line]
        path, output = tmp_path / "pairs.tsv", tmp_path / f"scores {has_json}"
        path.write_text("".join(f"{line}\n" for line in lines))
        arguments = ("--input", path, "--ids", "--output", output, "--pairs-per-request", 50)
        assert score(url, *arguments, "--score", "nll") == 0
        wanted = {number: codes[line] for number, line in enumerate(lines, 1) if codes[line]}
        assert _report(output) == wanted
        scores = _scores(output)
        assert len(scores) == len(lines)
        assert _bad_lines(scores) == set(wanted)
        assert scores[1] == pytest.approx(scores[0], rel=1e-6)


def test_a_report_has_the_line_in_place_of_the_index(
    url: str, corpus: Corpus, tmp_path: Path
) -> None:
    lines = [f"{_words(source)}\t{_words(target)}" for source, target in corpus.ids]
    lines[6] += " 2000000000"
    path, output = tmp_path / "pairs.tsv", tmp_path / "scores"
    path.write_text("".join(f"{line}\n" for line in lines))
    arguments = ("--input", path, "--ids", "--output", output, "--pairs-per-request", 4)
    assert score(url, *arguments) == 0
    (fault,) = output.with_name("scores.errors.jsonl").read_text().split("\n")[:-1]
    assert json.loads(fault)["line"] == 7
    assert json.loads(fault)["detail"].startswith("the target has the id 2000000000 at position")


def _words(ids: list[int]) -> str:
    return " ".join(map(str, ids))


def test_files_of_bad_pairs_alone_are_read_in_bounded_memory(url: str, tmp_path: Path) -> None:
    path, output = tmp_path / "pairs.jsonl", tmp_path / "scores"
    path.write_text("no JSON\n" * 500)
    assert score(url, "--input", path, "--output", output, "--pairs-per-request", 2) == 0
    assert len(_report(output)) == 500
    assert len(_scores(output)) == 500


@pytest.mark.parametrize(
    ("text", "num_lines"), [("", 0), ("\n", 1), ("a", 1), ("a\n", 1), ("\n\n", 2), ("a\nb\nc", 3)]
)
def test_short_files_have_the_lines_that_they_have(
    url: str, tmp_path: Path, text: str, num_lines: int
) -> None:
    path, output = tmp_path / "pairs.jsonl", tmp_path / "scores"
    path.write_text(text)
    assert score(url, "--input", path, "--output", output) == 0
    assert len(_scores(output)) == num_lines


@pytest.mark.parametrize("end", ["", "\n"])
def test_the_last_line_may_lack_its_end(url: str, corpus: Corpus, tmp_path: Path, end: str) -> None:
    path, output = tmp_path / "pairs.tsv", tmp_path / "scores"
    path.write_text("\n".join("\t".join(row) for row in corpus.texts) + end)
    assert score(url, "--input", path, "--output", output, *_SMALL) == 0
    assert len(_scores(output)) == len(corpus.texts)
    assert not output.with_name("scores.errors.jsonl").exists()


def test_an_empty_input_has_an_empty_output(url: str, tmp_path: Path) -> None:
    path, output = tmp_path / "pairs.tsv", tmp_path / "scores"
    path.touch()
    assert score(url, "--input", path, "--output", output) == 0
    assert {one.name for one in tmp_path.iterdir()} == {"pairs.tsv", "scores"}
    assert output.read_bytes() == b""


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_an_empty_output_is_compressed_too(url: str, tmp_path: Path, suffix: str) -> None:
    path, output = tmp_path / "pairs.tsv", tmp_path / f"scores{suffix}"
    path.touch()
    assert score(url, "--input", path, "--output", output) == 0
    assert output.stat().st_size > 0
    with closing(LineSource(str(output))) as source:
        assert source.fill(1) == 0


def test_what_is_cut_is_reported(url: str, tmp_path: Path) -> None:
    limit = httpx.get(f"{url}/models").json()["models"][0]["max_target_tokens"]
    path = tmp_path / "pairs.tsv"
    path.write_text(f"5 1\t5 1\n5 1\t{_words([5] * (limit + 3))}\n")
    arguments = ("--input", path, "--ids", *_SMALL)
    refused, cut = tmp_path / "refused", tmp_path / "cut"
    assert score(url, *arguments, "--output", refused) == 0
    assert _report(refused) == {2: "target_too_long"}
    assert score(url, *arguments, "--truncation", "--strict", "--output", cut) == 0
    assert _report(cut) == {2: "truncated"}
    assert "3 of the target" in cut.with_name("cut.errors.jsonl").read_text()
    assert not _bad_lines(_scores(cut))


def test_blocks_over_a_limit_of_the_service_are_sent_in_parts(
    bundle_of: Callable[[str], Bundle],
    corpus: Corpus,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SEQLOSS_MAX_PAIRS_PER_REQUEST", "3")
    monkeypatch.setenv("SEQLOSS_MAX_BODY_BYTES", "20000")
    server = Server(f"demo={bundle_of('demo').folder}")
    try:
        rows = list(corpus.texts)
        rows[4] = ("x" * 30_000, "y")
        arguments = WRITERS["tsv"](tmp_path, rows)
        parts, whole = tmp_path / "parts", tmp_path / "whole"
        options = ("--score", "nll", "--pairs-per-request")
        assert score(server.address, *arguments, "--output", parts, *options, 8) == 0
        assert score(server.address, *arguments, "--output", whole, *options, 1) == 0
    finally:
        server.process.kill()
        server.process.communicate()
    assert _report(parts) == _report(whole) == {5: "too_large"}
    assert _bad_lines(_scores(parts)) == {5}
    assert _scores(parts) == pytest.approx(_scores(whole), rel=1e-5, nan_ok=True)


# ---------------------------------------------------------------- pipes and statuses


def test_unequal_files_are_refused_with_both_counts(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target, output = tmp_path / "s", tmp_path / "t", tmp_path / "scores"
    source.write_text("line\n" * 30)
    target.write_text("line\n" * 17)
    arguments = ("--source", source, "--target", target, "--output", output, *_SMALL)
    assert score(url, *arguments) == 1
    message = capsys.readouterr().err
    assert f"{source} has 30 lines and {target} has 17" in message
    assert not output.exists()


def test_pipes_are_read_and_written(url: str, corpus: Corpus, tmp_path: Path) -> None:
    arguments = WRITERS["tsv"](tmp_path, corpus.texts)
    output = tmp_path / "scores"
    assert score(url, *arguments, "--output", output) == 0
    process = start_score(
        url, "--input", "-", "--input-format", "tsv", "--quiet", stdin=subprocess.PIPE
    )
    written, errors = process.communicate((tmp_path / "pairs.tsv").read_bytes())
    assert (process.returncode, errors) == (0, b"")
    assert written == output.read_bytes()


def test_bad_pairs_of_a_pipe_are_told_on_the_standard_error(url: str, tmp_path: Path) -> None:
    process = start_score(
        url, "--input", "-", "--input-format", "jsonl", "--quiet", stdin=subprocess.PIPE
    )
    written, errors = process.communicate(b"{\n")
    assert (process.returncode, written) == (0, b"nan\n")
    assert json.loads(errors)["code"] == "malformed_json"


def test_a_reader_that_goes_away_ends_the_run(url: str, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text("no JSON\n" * 20_000)
    read, write = os.pipe()
    process = start_score(url, "--input", path, "--report", tmp_path / "report", stdout=write)
    os.close(write)
    os.close(read)
    _, errors = process.communicate()
    assert process.returncode == 1
    assert errors.decode().endswith("whoever read the scores has gone\n")
    assert b"Traceback" not in errors


def test_strict_runs_say_by_their_status_that_a_pair_is_bad(url: str, tmp_path: Path) -> None:
    path = tmp_path / "pairs.tsv"
    path.write_text("a\tb\nc\n")
    assert score(url, "--input", path, "--output", tmp_path / "lax") == 0
    assert score(url, "--input", path, "--output", tmp_path / "strict", "--strict") == 3
    assert (tmp_path / "lax").read_bytes() == (tmp_path / "strict").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --source and --target, or --input"),
        (["--source", "PAIRS"], "give --source and --target, or --input"),
        (["--source", "-", "--target", "-"], "only one standard input"),
        (["--source", "PAIRS", "--target", "PAIRS", "--input", "PAIRS"], "and not both"),
        (["--source", "PAIRS", "--target", "PAIRS", "--header"], "--header goes with --input"),
        (["--input", "PAIRS.gone.tsv"], "cannot be read: No such file"),
        (["--input", "PAIRS.odd"], "does not say what format"),
        (["--input", "PAIRS", "--target-column", "3"], "has 2 columns, and none with the number 3"),
        (["--input", "PAIRS", "--target-column", "other"], "is no number of a column"),
        (["--input", "PAIRS", "--header", "--source-column", "other"], "has no column 'other'"),
        (["--input", "PAIRS", "--normalize"], "--normalize goes with --format marian"),
        (["--input", "PAIRS", "--format", "tsv", "--score", "nll"], "--score chooses"),
        (["--input", "PAIRS", "--format", "parquet"], "cannot be written to a pipe"),
        (["--input", "PAIRS", "--ids", "--target-language", "de"], "languages are for text"),
        (["--input", "PAIRS", "--label-smoothing", "2"], "--label-smoothing is 2.0"),
        (["--input", "PAIRS", "--output", "PAIRS", "--force"], "is the input"),
        (["--input", "PAIRS", "--model", "other"], "there is no model 'other'; served are: demo"),
        (["--input", "PAIRS", "--output", "PAIRS/x"], "cannot be written"),
    ],
)
def test_commands_that_make_no_sense_are_refused(
    url: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    path = tmp_path / "pairs.tsv"
    path.write_text("a\tb\n")
    assert score(url, *(one.replace("PAIRS", str(path)) for one in arguments)) == 1
    assert message in capsys.readouterr().err
    assert {one.name for one in tmp_path.iterdir()} == {"pairs.tsv"}


def test_no_service_is_told_after_the_patience_that_was_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "pairs.tsv"
    path.write_text("a\tb\n")
    assert score("http://127.0.0.1:9", "--input", path, "--retry-for", "0") == 1
    assert "127.0.0.1:9" in capsys.readouterr().err


# ---------------------------------------------------------------- what it costs


def test_only_the_chosen_command_is_imported() -> None:
    program = (
        "import sys\n"
        "from seqloss_client.cli import main\n"
        "try:\n    main(['score', '--help'])\nexcept SystemExit:\n    pass\n"
        "print(sorted(name for name in sys.modules if name.startswith('seqloss_client.')))\n"
        "print([name for name in ('pyarrow', 'torch', 'seqloss', 'duckdb', "
        "'matplotlib') if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": str(CLIENT)},
        capture_output=True,
        text=True,
        check=True,
    )
    *_, ours, others = done.stdout.splitlines()
    assert "seqloss_client.corpus.score" in ours
    assert not any(name in ours for name in ("filtering", "reranking", "report", "parquet"))
    assert others == "[]"


def test_memory_does_not_grow_with_the_input(url: str, tmp_path: Path) -> None:
    path, output = tmp_path / "pairs.jsonl.gz", tmp_path / "scores"
    line = json.dumps({"source": "a" * 1500, "target": 5}).encode() + b"\n"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(200):
            file.write(line * 1000)  # 300 MB in all, of which no pair is good
    program = (
        "import sys; from seqloss_client.cli import main; status = main(sys.argv[1:]); "
        "print(open('/proc/self/status').read()); sys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "score", "--url", url, "--input", path, "--output", output],
        env=os.environ | {"PYTHONPATH": str(CLIENT)},
        capture_output=True,
        text=True,
        check=True,
    )
    peak = re.search(r"VmHWM:\s+(\d+) kB", done.stdout)
    assert peak is not None
    assert int(peak.group(1)) < 300 * 1024
    assert output.read_text() == "nan\n" * 200_000


# ---------------------------------------------------------------- real text


def test_real_text_is_scored_line_for_line(url: str, tmp_path: Path) -> None:
    if not _CORPORA.is_dir():
        pytest.skip(f"{_CORPORA} is absent: it does not belong to the project")
    folder = _CORPORA / "flores-dev"
    sides = [(folder / name).read_text().split("\n")[:60] for name in ("en.txt", "de.txt")]
    rows = list(zip(*sides, strict=True))
    outputs = []
    for name, write in WRITERS.items():
        if name == "parquet":
            continue
        output = tmp_path / f"{name} scores"
        arguments = write(tmp_path, rows)
        assert score(url, *arguments, "--output", output, "--pairs-per-request", 25) == 0
        outputs.append(output.read_bytes())
    assert outputs[0].count(b"\n") == len(rows)
    assert set(outputs) == {outputs[0]}


# ---------------------------------------------------------------- what people are told


class Terminal(io.StringIO):
    """What `ProgressDisplay` writes to."""

    def __init__(self, is_terminal: bool) -> None:
        super().__init__()
        self._is_terminal = is_terminal

    def isatty(self) -> bool:
        return self._is_terminal


def _shown(stream: Terminal, size: int | None, steps: list[tuple[float, int]]) -> str:
    now = 0.0
    display = ProgressDisplay(size, stream=stream, clock=lambda: now)
    display.start(1000)
    done = 500
    for seconds, position in steps:
        now, done = seconds, done + 100
        display.add(100, 3000, position, done)
    display.close()
    return stream.getvalue()


def test_a_terminal_has_a_bar_with_rates_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    shown = _shown(Terminal(True), 5000, [(1, 2000), (1.1, 2100), (2, 3000)])
    first, second = (part.strip() for part in shown.split("\r")[1:3])
    # 100 pairs and 3,000 tokens in 1 second, in which 1,000 of the 4,000 bytes that were left went.
    assert first.endswith("] 40%, 600 pairs, 100 pairs/s, 3,000 tokens/s, 0:00:03 left")
    assert second.endswith("] 60%, 800 pairs, 150 pairs/s, 4,500 tokens/s, 0:00:02 left")


def test_a_log_has_a_line_now_and_then() -> None:
    shown = _shown(Terminal(False), None, [(10, 2000), (40, 2100), (50, 2200), (80, 3000)])
    assert shown == ("700 pairs, 5 pairs/s, 150 tokens/s\n900 pairs, 5 pairs/s, 150 tokens/s\n")
