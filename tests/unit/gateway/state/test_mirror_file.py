"""The mirror's file: what goes in comes out, byte for byte, or the line is named that can't be read."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.state.mirror_file import DamagedMirrorError, Header, encode_line, read_mirror
from shared import subjects
from shared.broker.jetstream import Record
from shared.messages.encoding import encode

JOBS, STATE = subjects.JOBS_STREAM, subjects.state_stream("a")
FIRST = encode(Header(1, "g")) + b"\n"


def record(sequence: int, data: bytes) -> Record:
    return Record(sequence, f"podium.state.a.t{sequence}", data, "2026-11-23T18:22:38.370730559Z")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(contents=st.lists(st.one_of(st.binary(max_size=40), st.text(max_size=20).map(str.encode)), max_size=6))
def test_every_record_comes_back_as_it_was(contents: list[bytes], tmp_path: Path) -> None:
    records = [record(number, data) for number, data in enumerate(contents, 3)]
    path = tmp_path / "1.jsonl"
    path.write_bytes(FIRST + b"".join(encode_line(STATE, each) for each in records))
    content = read_mirror(path)
    assert content.records == ({STATE: records} if records else {})
    assert content.end == content.size
    assert content.last(STATE) == (records[-1].sequence if records else 0)


@pytest.mark.parametrize(
    "data",
    [b'{"kind": "job", "x": [1, 2.50]}', b"no json", b'{\n "a": 1}', b" {}", b"", b"\xff", b"[" * 5000],
)
def test_what_people_can_read_stays_readable(data: bytes, tmp_path: Path) -> None:
    line = encode_line(JOBS, record(1, data))
    assert line.count(b"\n") == 1
    assert (b'"base64"' in line) is (not data.startswith(b'{"kind"'))
    (tmp_path / "1.jsonl").write_bytes(FIRST + line)
    assert read_mirror(tmp_path / "1.jsonl").records[JOBS] == [record(1, data)]


def test_a_line_that_was_cut_short_is_left_out_wherever_the_cut_is(tmp_path: Path) -> None:
    lines = FIRST + encode_line(JOBS, record(1, b"{}")) + encode_line(JOBS, record(2, b'{"a": 1}'))
    whole = len(FIRST + encode_line(JOBS, record(1, b"{}")))
    path = tmp_path / "1.jsonl"
    for cut in range(whole, len(lines)):
        path.write_bytes(lines[:cut])
        content = read_mirror(path)
        assert [each.sequence for each in content.records[JOBS]] == [1]
        assert (content.end, content.size) == (whole, cut)


@pytest.mark.parametrize(
    ("damaged", "said"),
    [
        (b'{"stream": "JOBS", "sequ\n', "line 3"),
        (encode_line(JOBS, record(1, b"{}")), "sequence 1 comes after 1"),
        (b'{"stream": "OTHER", "sequence": 9, "subject": "s"}\n', "OTHER"),
    ],
)
def test_a_damaged_line_is_named(damaged: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "1.jsonl"
    path.write_bytes(
        FIRST + encode_line(JOBS, record(1, b"{}")) + damaged + encode_line(JOBS, record(5, b"{}"))
    )
    with pytest.raises(DamagedMirrorError, match=said):
        read_mirror(path)


def test_gaps_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "1.jsonl"
    path.write_bytes(FIRST + b"".join(encode_line(JOBS, record(number, b"{}")) for number in (4, 5, 8)))
    content = read_mirror(path)
    assert (content.missing(JOBS), content.missing(STATE)) == (2, 0)


def test_the_old_log_of_all_slots_is_read_as_the_slots_logs(tmp_path: Path) -> None:
    path = tmp_path / "1.jsonl"
    old = [Record(number, f"podium.state.{'ab'[number % 2]}.t", b"{}", "then") for number in range(1, 7)]
    new = Record(7, "podium.state.b.t", b"{}", "now")
    stray = Record(8, "podium.state.nowhere", b"{}")
    path.write_bytes(
        FIRST
        + b"".join(encode_line(subjects.OLD_STATE_STREAM, each) for each in [*old[:2], *old[3:], stray])
        + encode_line("STATE-b", new)
    )
    content = read_mirror(path)
    assert content.records == {"STATE-b": [old[0], old[4], new], "STATE-a": old[1::2]}
    assert content.states == ["STATE-a", "STATE-b"]
    assert (content.missing("STATE-a"), content.missing("STATE-b")) == (1, 1)  # whose it was can't be known


@pytest.mark.parametrize(
    ("a", "b", "missing"),
    [
        ([1, 2, 8, 9], list(range(1, 21)), (5, 0)),  # logs that began apart
        ([3, 4], [1, 2, 5], (0, 0)),  # the slots' records of STATE
        ([1, 3, 4, 8], [2, 4, 5, 6], (3, 0)),  # and what came later: both have gone on at 4
        ([1, 3, 4, 5], [2, 4, 9], (0, 4)),
    ],
)
def test_gaps_of_a_slots_log_are_its_own(
    a: list[int], b: list[int], missing: tuple[int, int], tmp_path: Path
) -> None:
    path = tmp_path / "1.jsonl"
    lines = [
        encode_line(f"STATE-{slot}", Record(number, f"podium.state.{slot}.t", b"{}"))
        for slot, numbers in (("a", a), ("b", b))
        for number in numbers
    ]
    path.write_bytes(FIRST + b"".join(lines))
    content = read_mirror(path)
    assert (content.missing("STATE-a"), content.missing("STATE-b")) == missing


@pytest.mark.parametrize("stream", ["STATE-b", "STATE-", "STATE-a.t"])
def test_a_line_of_another_slots_log_is_damaged(stream: str, tmp_path: Path) -> None:
    path = tmp_path / "1.jsonl"
    path.write_bytes(FIRST + encode_line(stream, record(1, b"{}")))
    with pytest.raises(DamagedMirrorError, match=r"no log of podium\.state\.a\.t1"):
        read_mirror(path)
