"""Replays on paper: who holds which slot when, and what it is worth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gateway.policy.builtin import BUILT_IN
from gateway.policy.interface import PolicyView, Verdict
from podium.__main__ import main
from podium.simulation.replay import Report, Rules, replay
from podium.simulation.trace import TraceLine, read_trace
from shared.errors import PodiumError
from shared.messages.encoding import encode
from shared.messages.offers import BareOffer, Decision, TaskType
from shared.planning.hardware import parse_hardware

HOUR = 3600.0
RULES: dict[str, Any] = {
    "slots": ("s1", "s2"),
    "hardware": parse_hardware("4xH100-80GB"),
    "profile": "maximum_accuracy",
    "max_hours": 96.0,
    "deadline_margin_s": 0.0,
    "reservation_s": 900.0,
    "min_points_per_hour": 0.0,
    "prior_strength": 10.0,
    "half_life_s": 30 * 86400.0,
    "win": 0.25,
    "fail": 0.10,
}


def line(at: float, task: str, hours: float = 4.0, **fields: Any) -> TraceLine:
    own = ("start_after_s", "ran_s", "delivered", "score")
    values: dict[str, Any] = {
        "task_id": task,
        "task_type": TaskType.INSTRUCT,
        "model": "org/llama-1b",
        "hours_to_complete": hours,
    }
    offer = BareOffer(**(values | {name: value for name, value in fields.items() if name not in own}))
    return TraceLine(at=at, offer=offer, **{name: fields[name] for name in own if name in fields})


def run(lines: list[TraceLine], policy: Any = "first_come", **rules: Any) -> Report:
    function = BUILT_IN[policy] if isinstance(policy, str) else policy
    return replay(lines, function, "p", Rules(**(RULES | rules)))


def test_slots_are_busy_until_jobs_end() -> None:
    report = run(
        [
            line(0, "a"),
            line(1, "b"),
            line(2, "c"),
            line(4 * HOUR, "d"),
            line(4 * HOUR, "e"),
            line(8 * HOUR, "f"),
        ]
    )
    # a and b run for 4 hours; at 4 h only a has ended, so that d is taken and e is not; at 8 h both are free
    assert (report.offers, report.accepted, report.rejected) == (6, 4, {"capacity": 2})
    assert report.hours == 8
    assert report.running_share == pytest.approx((4 + 4 + 4) / 16)
    assert report.points == pytest.approx(4 * 4.0 * 0.65)  # W = 2 sqrt(4 * 1), 3 * .25 - .1
    assert report.points_per_day == pytest.approx(3 * report.points)
    assert report.by_type == {"InstructTextTask": (6, 4)}


def test_recorded_times_and_outcomes_are_taken_as_they_are() -> None:
    report = run(
        [
            line(0, "a", ran_s=60.0, score=3.0),
            line(60, "b", ran_s=60.0, delivered=False),
            line(120, "c", ran_s=60.0, delivered=True),
            line(180, "d", ran_s=60.0, score=0.0),
        ],
        slots=("s1",),
    )
    assert (report.accepted, report.recorded) == (4, 4)
    assert report.running_share == pytest.approx(1.0)
    assert report.points == pytest.approx(4.0 * (3 - 1 + 3 * 0.25 / 0.9 + 0))


def test_what_never_starts_holds_its_slot_until_the_reservation_lapses() -> None:
    lines = [
        line(0, "a", start_after_s=None),
        line(899, "b"),
        line(900, "a", start_after_s=100.0),
        line(1e4, "c"),
    ]
    report = run(lines, slots=("s1",))
    assert (report.accepted, report.never_started, report.started) == (
        2,
        1,
        1,
    )  # a is decided again, and runs
    assert report.again == 0
    assert report.reserved_share == pytest.approx(1000 / 1e4)
    assert report.points == pytest.approx(4.0 * 0.65)


def test_a_late_start_is_honoured_while_a_slot_is_free_and_fails_else() -> None:
    late = line(0, "a", start_after_s=1000.0)
    assert run([late, line(2000, "z")], slots=("s1",)).started == 1
    report = run([late, line(950, "b"), line(2000, "z")], slots=("s1",))
    assert (report.accepted, report.late_refused) == (2, 1)
    assert report.points == pytest.approx(4.0 * 0.65 - 4.0)


def test_an_accepted_task_is_answered_again_without_a_second_slot() -> None:
    report = run([line(0, "a"), line(1, "a"), line(2, "b")])
    assert (report.offers, report.accepted, report.again) == (3, 2, 1)


def test_recorded_failures_change_later_decisions() -> None:
    lines = [line(5 * HOUR * number, f"t{number}", delivered=False, score=-1.0) for number in range(40)]
    learned = run(lines, "expected_value", slots=("s1",))
    assert 0 < learned.accepted < 40
    assert set(learned.rejected) == {"priority"}
    assert run(lines, "first_come").accepted == 40


def test_refusals_are_counted_by_kind() -> None:
    lines = [
        line(0, "a", 97.0),
        line(1, "b", 0.001, model="org/llama-8b"),
        line(2, "c", task_type=TaskType.IMAGE),
        line(3, "d"),
        line(4, "e"),
        line(5, "f"),
    ]
    assert run(lines, "maximum_accuracy").rejected == {
        "plan": 2,
        "too_long": 1,
        "capacity": 1,
    }


def test_a_policy_that_takes_what_can_not_be_done_pays_for_it() -> None:
    def greedy(_: BareOffer, view: PolicyView) -> Verdict:
        return Verdict(reason="mine", slot=view.slots[0].slot)

    assert run([line(0, "a", task_type=TaskType.IMAGE)], greedy).points == pytest.approx(-4.0)


@given(
    times=st.lists(
        st.tuples(st.floats(0, 1e5), st.floats(0.1, 30), st.sampled_from([None, 0.0, 60.0, 2000.0]))
    ),
    slots=st.integers(1, 4),
    policy=st.sampled_from(sorted(BUILT_IN)),
)
@example(times=[(0.0, 30.0, None), (1e-320, 30.0, None)], slots=1, policy="first_come")  # no time between
def test_never_more_jobs_than_slots(
    times: list[tuple[float, float, float | None]], slots: int, policy: str
) -> None:
    lines = [
        line(at, f"t{n}", hours, start_after_s=start)
        for n, (at, hours, start) in enumerate(sorted(times, key=lambda each: each[0]))
    ]
    if not lines:
        return
    report = run(lines, policy, slots=tuple(map(str, range(slots))))
    assert report.accepted + sum(report.rejected.values()) + report.again == report.offers == len(lines)
    assert report.running_share + report.reserved_share <= 1 + 1e-9
    assert report.started + report.never_started + report.late_refused == report.accepted


def test_a_trace_is_read_in_order_and_may_be_a_gateways_own_file(tmp_path: Path) -> None:
    offer = line(0, "a").offer
    decision = Decision(task_id="a", task="a", accepted=False, reason="no", decided_at=7.0)
    trace = tmp_path / "trace.jsonl"
    generated = {"at": 9, "offer": json.loads(encode(offer)) | {"colour": 1}, "start_after_s": None, "x": []}
    trace.write_bytes(
        b"\n".join(
            [
                json.dumps(generated).encode(),
                b"",
                encode(decision),  # of a version that wrote no offer
                encode(
                    Decision(
                        **{n: getattr(decision, n) for n in decision.__struct_fields__} | {"offer": offer}
                    )
                ),
            ]
        )
    )
    read = read_trace(trace)
    assert [(each.at, each.offer, each.start_after_s) for each in read.lines] == [
        (7.0, offer, 0.0),
        (9.0, offer, None),
    ]
    assert read.skipped == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no offers"),
        ("nothing", "line 1: "),
        ('{"at": 1}', "line 1: Object missing required field `offer`"),
        ('{"at": 1, "offer": {"task_id": "t"}}', "task_type"),
        ("[" * 100_000, "line 1: "),
    ],
)
def test_a_bad_trace_is_refused_with_the_line(tmp_path: Path, text: str, said: str) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text(text)
    with pytest.raises(PodiumError, match=said):
        read_trace(trace)
    with pytest.raises(PodiumError, match="can't be read"):
        read_trace(tmp_path / "none")


def test_the_command_compares_policies_and_ends_with_one_json_object(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = tmp_path / "trace.jsonl"
    offer = json.loads(encode(line(0, "a").offer))
    trace.write_text(
        "".join(json.dumps({"at": n, "offer": offer | {"task_id": f"t{n}"}}) + "\n" for n in range(3))
    )
    policies = ["--policy", "maximum_accuracy", "--policy", "first_come"]
    assert main(["policy", "replay", str(trace), *policies, "--hardware", "4xH100-80GB"]) == 0
    out = capsys.readouterr().out
    assert "rejected: capacity" in out
    last = json.loads(out.splitlines()[-1])
    assert [(each["policy"], each["accepted"]) for each in last["replays"]] == [
        ("maximum_accuracy", 2),
        ("first_come", 2),
    ]
    assert main(["policy", "replay", str(trace), "--policy", "nice"]) == 2
    assert "unknown policy 'nice'" in capsys.readouterr().err
    monkeypatch.setenv("PODIUM_POLICY", "expected_value")
    assert main(["policy", "replay", str(trace), "--slots", "1"]) == 0
    replayed = json.loads(capsys.readouterr().out.splitlines()[-1])["replays"]
    assert [(each["policy"], each["accepted"]) for each in replayed] == [("expected_value", 1)]
    assert main(["policy", "list"]) == 0
    assert "expected_value" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--slots", "0"], ["--win", "2"], ["--fail", "nan"], ["--slots", "x"]])
def test_arguments_that_make_no_sense_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        main(["policy", "replay", "trace.jsonl", *arguments])
