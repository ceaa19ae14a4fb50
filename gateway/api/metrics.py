"""`/metrics`: counters and state of this gateway, collected on each scrape.

The only label from a task is its slot, so the number of series depends on the fleet alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Final

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from gateway.connections import REASONS
from gateway.service import Service
from gateway.state.ledger import TaskState
from gateway.telemetry.counters import AGAIN, BOUNDS_S, DECISIONS, Measures
from gateway.telemetry.refusals import RefusalReason
from gateway.views.build import slot_view
from gateway.views.schemas import SlotView
from shared import subjects
from shared.messages.jobs import ResultStatus
from shared.messages.offers import DecisionKind
from shared.messages.runs import Phase, Progress
from shared.planning.hardware import parse_hardware

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
SLOT_STATES: Final = ("free", "reserved", "busy")


def exposition(service: Service) -> bytes:
    """Return every metric, in Prometheus' text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(GatewayCollector(service))
    ProcessCollector(registry=registry)
    return generate_latest(registry)


class GatewayCollector(Collector):
    """Collects the current metrics of one gateway."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterable[Metric]:
        """Yield every metric family."""
        yield from _decisions(self._service.measures)
        yield from _offers(self._service)
        yield from _latencies(self._service.measures)
        yield from _slots(self._service)
        yield from _runs(self._service)
        yield from _gateway(self._service)
        yield from _events(self._service)
        yield from _connections(self._service)


def _decisions(measures: Measures) -> Iterator[Metric]:
    family = CounterMetricFamily(
        "podium_decisions",
        "Offers decided by this gateway, by outcome and reason.",
        labels=("outcome", "reason"),
    )
    for reason in DECISIONS:
        outcome = "accepted" if reason in (DecisionKind.ACCEPTED, AGAIN) else "rejected"
        family.add_metric((outcome, str(reason)), measures.decisions[reason])
    yield family
    newest = measures.newest
    if newest is None:
        return
    if newest.terms is not None:
        terms = GaugeMetricFamily(
            "podium_decision_term",
            "Terms of the newest decision's score, before weighting.",
            labels=("term",),
        )
        for name in newest.terms.__struct_fields__:
            terms.add_metric((name,), getattr(newest.terms, name).value)
        yield terms
    if newest.priority is not None:
        yield _gauge("podium_decision_priority", "Priority of the newest decision.", newest.priority)


def _offers(service: Service) -> Iterator[Metric]:
    measures = service.measures
    malformed = CounterMetricFamily(
        "podium_malformed_offers", "Requests whose body was not a valid offer.", labels=("over",)
    )
    malformed.add_metric(("http",), measures.malformed_offers)
    malformed.add_metric(("nats",), service.responder.malformed)
    yield malformed
    refused = CounterMetricFamily(
        "podium_refused_requests", "Requests of validators that were refused.", labels=("reason",)
    )
    for reason in RefusalReason:
        refused.add_metric((reason.value,), service.refusals.counts[reason])
    yield refused
    starts = CounterMetricFamily(
        "podium_starts",
        "Starts: in time, after the reservation had lapsed, refused, or not what was offered.",
        labels=("outcome",),
    )
    starts.add_metric(("in_time",), measures.starts.in_time)
    starts.add_metric(("late",), measures.starts.late)
    starts.add_metric(("refused",), measures.starts.refused)
    starts.add_metric(("mismatch",), measures.starts.mismatched)
    yield starts
    yield _counter(
        "podium_moved_jobs",
        "Unclaimed jobs that this gateway moved to another slot.",
        measures.moved_jobs,
    )
    results = CounterMetricFamily(
        "podium_results", "Results in the logs, by status; the same on every gateway.", labels=("status",)
    )
    for status in ResultStatus:
        results.add_metric((status.value,), measures.results[status.value])
    yield results
    yield _counter(
        "podium_late_submissions",
        "Submissions stored after their deadline, in the logs.",
        measures.late_submissions,
    )


def _latencies(measures: Measures) -> Iterator[Metric]:
    family = HistogramMetricFamily(
        "podium_http_request_seconds",
        "Time from a request's head to its response.",
        labels=("route", "status"),
    )
    for (route, status), latencies in sorted(measures.latencies.items()):
        total, buckets = 0, list[tuple[str, float]]()
        for bound, count in zip((*map(str, BOUNDS_S), "+Inf"), latencies.counts, strict=True):
            total += count
            buckets.append((bound, total))
        family.add_metric((route, str(status)), buckets, latencies.seconds)
    yield family


def _slots(service: Service) -> Iterator[Metric]:
    now = time.time()
    views = [slot_view(slot, service.ledger, service.presence, now) for slot in service.settings.slots]
    states = GaugeMetricFamily(
        "podium_slot_state", "1 for the slot's current state, by the logs.", labels=("slot", "state")
    )
    for view in views:
        for state in SLOT_STATES:
            states.add_metric((view.slot, state), float(view.state == state))
    yield states
    live = _by_slot("podium_slot_live", "1 if a node that holds the slot's lease sends heartbeats.")
    age = _by_slot("podium_slot_heard_age_seconds", "Time since the slot's last heartbeat.")
    for view in views:
        live.add_metric((view.slot,), float(view.live))
        if view.last_heartbeat_age_s is not None:
            age.add_metric((view.slot,), view.last_heartbeat_age_s)
    yield live
    yield age
    wanted = parse_hardware(service.settings.expected_hardware).name
    expected = _by_slot("podium_slot_expected_hardware", "1 if the slot shows the hardware it should have.")
    for view in views:
        if view.live and view.hardware is not None:
            expected.add_metric((view.slot,), float(view.hardware.name == wanted))
    yield expected
    drained = _by_slot("podium_slot_drained", "1 if an operator keeps new jobs away from the slot.")
    for view in views:
        drained.add_metric((view.slot,), float(view.drain is not None))
    yield drained
    yield from _gpus(service, views)


def _gpus(service: Service, views: list[SlotView]) -> Iterator[Metric]:
    used = GaugeMetricFamily("podium_gpu_memory_used_bytes", "Memory in use.", labels=("slot", "gpu"))
    total = GaugeMetricFamily("podium_gpu_memory_bytes", "Memory of a GPU.", labels=("slot", "gpu"))
    busy = GaugeMetricFamily("podium_gpu_utilization_ratio", "0 to 1.", labels=("slot", "gpu"))
    for view in views:
        sign = service.presence.sign(view.slot)
        for gpu in sign.heartbeat.gpus if view.live and sign and sign.heartbeat else ():
            labels = (view.slot, str(gpu.index))
            used.add_metric(labels, gpu.memory_used)
            total.add_metric(labels, gpu.memory_total)
            if gpu.utilization is not None:
                busy.add_metric(labels, gpu.utilization)
    yield from (used, total, busy)


def _runs(service: Service) -> Iterator[Metric]:
    """Yield the metrics of each slot's job; a slot without a job has no series."""
    now = time.time()
    phases = GaugeMetricFamily(
        "podium_job_phase", "1 for the current phase of the slot's job.", labels=("slot", "phase")
    )
    state = GaugeMetricFamily(
        "podium_job_state",
        "1 for the current state of the slot's job, by the logs.",
        labels=("slot", "state"),
    )
    left = _by_slot(
        "podium_job_deadline_seconds", "Time left until the deadline of the slot's job; negative after it."
    )
    attempts = _by_slot("podium_job_attempts", "Attempts of the slot's job that count against the limit.")
    progress: list[tuple[str, Progress]] = []
    for slot in service.settings.slots:
        holder = service.ledger.holder(slot, now)
        if holder is None or holder.job is None:
            continue
        task_state = service.ledger.state(holder, now)
        for each in (TaskState.QUEUED, TaskState.RUNNING, TaskState.SUBMITTING):
            state.add_metric((slot, each.value), float(task_state is each))
        left.add_metric((slot,), holder.job.deadline_at - now)
        claimed = service.ledger.chain_of(holder.job).claimed
        attempts.add_metric((slot,), claimed.attempt if claimed else 0)
        newest = service.presence.progress(holder.job.task)
        if newest is not None:
            progress.append((slot, newest))
            for phase in Phase:
                phases.add_metric((slot, phase.value), float(newest.phase is phase))
    yield from (state, left, attempts, phases)
    yield from _progress(progress)


def _progress(runs: list[tuple[str, Progress]]) -> Iterator[Metric]:
    for name, meaning, field in (
        ("podium_job_progress_ratio", "Share of the training budget used.", "progress"),
        ("podium_job_step", "Optimiser steps.", "step"),
        ("podium_job_tokens", "Tokens trained.", "tokens"),
        ("podium_job_loss", "Training loss.", "loss"),
        ("podium_job_base_loss", "Loss of the base model on the development rows.", "base_loss"),
        ("podium_job_dev_loss", "Loss on the development rows.", "dev_loss"),
        ("podium_job_learning_rate", "Learning rate.", "lr"),
        ("podium_job_skipped_steps", "Steps without a finite gradient.", "skipped_steps"),
        ("podium_job_tokens_per_second", "Speed of training.", "tokens_per_s"),
    ):
        family = _by_slot(name, meaning)
        for slot, progress in runs:
            value = getattr(progress, field)
            if value is not None:
                family.add_metric((slot,), value)
        yield family


def _gateway(service: Service) -> Iterator[Metric]:
    info = service.info()
    about = GaugeMetricFamily("podium_gateway", "This gateway.", labels=("gateway", "version"))
    about.add_metric((info.gateway, info.version), 1)
    yield about
    yield _gauge("podium_ready", "1 if the gateway can decide on offers.", float(info.not_ready is None))
    yield _gauge("podium_nats_connected", "1 if the gateway is connected to NATS.", float(service.connected))
    folded = GaugeMetricFamily(
        "podium_log_folded_sequence",
        "Sequence of the newest record that this gateway has applied.",
        labels=("stream",),
    )
    behind = GaugeMetricFamily(
        "podium_mirror_behind_records", "Records that the mirror's file lacks.", labels=("stream",)
    )
    for stream, sequence in info.folded.items():
        folded.add_metric((stream,), sequence)
        behind.add_metric((stream,), max(0, sequence - info.mirror.last.get(stream, 0)))
    yield from (folded, behind)
    full = GaugeMetricFamily(
        "podium_log_full", "1 if a log has no room for another job's records.", labels=("stream",)
    )
    full.add_metric((subjects.JOBS_STREAM,), float(info.full_log is not None))
    for slot in service.settings.slots:
        full.add_metric((subjects.state_stream(slot),), float(slot in info.full_slots))
    yield full
    if (age := service.log_age_s) is not None:
        yield _gauge("podium_log_age_seconds", "Time since the logs were last read to their ends.", age)
    yield _gauge(
        "podium_mirror_failed", "1 if the mirror can't be written.", float(info.mirror.error is not None)
    )
    yield _counter("podium_lost_decisions", "Decisions missing from the gateway's file.", info.lost_decisions)
    yield _counter("podium_malformed_records", "Stored records that are malformed.", info.malformed_records)
    yield _counter(
        "podium_malformed_messages", "Received messages that are malformed.", info.malformed_messages
    )
    yield _gauge(
        "podium_denied_subjects", "Subjects that the broker has denied to this gateway.", len(info.denied)
    )


def _events(service: Service) -> Iterator[Metric]:
    log = service.events
    published = CounterMetricFamily("podium_events", "Events for readers of /v1/events.", labels=("type",))
    for name, count in sorted(log.counts.items()):
        published.add_metric((name,), count)
    yield published
    yield _gauge("podium_event_readers", "Open streams of /v1/events.", log.readers)
    yield _counter("podium_lost_events", "Events that slow readers missed.", log.lost)


def _connections(service: Service) -> Iterator[Metric]:
    connections = service.connections
    yield _gauge("podium_connections", "Open HTTP connections.", connections.open)
    closed = CounterMetricFamily(
        "podium_closed_connections", "Connections that the gateway closed itself.", labels=("reason",)
    )
    for reason in REASONS:
        closed.add_metric((reason,), connections.closed[reason])
    yield closed


def _by_slot(name: str, meaning: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, meaning, labels=("slot",))


def _gauge(name: str, meaning: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, meaning, value=value)


def _counter(name: str, meaning: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(name, meaning, value=value)
