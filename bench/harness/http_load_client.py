"""A lean HTTP/1.1 load client: epoll, keep-alive, requests written and signed before the clock starts.

Run `run(plan)` in a separate process (`Generator`), pinned to a core of its own.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import select
import socket
import time
import uuid
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor

import msgspec
from msgspec import Struct

from bench.fake_validator.validator import OFFER, keys_from_seed, request_bytes, signed_headers

MODELS = (
    ("unsloth/Llama-3.2-1B", 1_235_814_400),
    ("Qwen/Qwen2.5-0.5B-Instruct", 494_032_768),
    ("mistralai/Mistral-7B-v0.1", 7_241_732_096),
    ("HuggingFaceTB/SmolLM2-135M-Instruct", 134_515_008),
    ("google/gemma-2-2b", None),
)
TEXT_TYPES = ("InstructTextTask", "ChatTask", "DpoTask")
TOO_LONG = 0.03  # share of offers of more than 96 hours
REPEATED = 0.02  # share of offers of tasks that are accepted already
PATIENCE_S = 30.0
READ = 1 << 16


class Plan(Struct, frozen=True, kw_only=True):
    """One round: `count` offers over `connections` connections."""

    port: int
    count: int
    connections: int
    seed: int
    accepted: tuple[str, ...] = ()  # tasks that hold the slots
    validator: str | None = None  # seed of the validator's keys; None = unsigned
    miner: str = ""
    path: str = OFFER


class Measured(Struct, frozen=True, kw_only=True):
    """Measurements of one round."""

    seconds: float
    cpu_s: float  # of this client
    latencies: list[float]
    statuses: dict[str, int]
    accepted: int

    @property
    def per_second(self) -> float:
        """Return the responses per second."""
        return len(self.latencies) / self.seconds


class Connection:
    """One connection with at most one request under way."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.settimeout(PATIENCE_S)
        self.sent_at = 0.0
        self.kept = b""

    def send(self, request: bytes) -> None:
        """Send the next request; it is small enough for the socket's buffer."""
        self.sent_at = time.perf_counter()
        self.socket.sendall(request)

    def receive(self) -> bytes | None:
        """Return the whole response, or None if more of it is to come."""
        data = self.socket.recv(READ)
        if not data:
            raise ConnectionError("the server closed a keep-alive connection")
        if self.kept:
            data = self.kept + data
        end = data.find(b"\r\n\r\n")
        if end < 0 or len(data) < end + 4 + _content_length(data, end):
            self.kept = data
            return None
        self.kept = b""
        return data


def _content_length(data: bytes, end: int) -> int:
    """Return the body length of a response whose headers end at `end`; names come in either case."""
    at = data.find(b"ontent-", 0, end)
    while at >= 0:
        if data[at + 7 : at + 14].lower() == b"length:":
            stop = data.find(b"\r", at)
            return int(data[at + 14 : stop])
        at = data.find(b"ontent-", at + 1, end)
    return 0


def offers(plan: Plan) -> list[bytes]:
    """Return bodies of offers: text tasks of all types, a few too long, a few of accepted tasks."""
    chance = random.Random(plan.seed)
    bodies = []
    for _ in range(plan.count):
        model, parameters = chance.choice(MODELS)
        task = str(uuid.UUID(int=chance.getrandbits(128), version=4))
        if plan.accepted and chance.random() < REPEATED:
            task = chance.choice(plan.accepted)
        offer = {
            "ds_size": 100_000,
            "model": model,
            "hours_to_complete": 97 if chance.random() < TOO_LONG else chance.randint(1, 10),
            "task_id": task,
            "task_type": chance.choice(TEXT_TYPES),
            "model_params_count": parameters,
        }
        bodies.append(msgspec.json.encode(offer))
    return bodies


def requests(plan: Plan) -> list[bytes]:
    """Return the bytes of every request of a round, signed if the plan has a validator."""
    keys = keys_from_seed(plan.validator) if plan.validator else None
    plain = {"Content-Type": "application/json"}
    return [
        request_bytes("POST", plan.path, signed_headers(keys, plan.miner, body) if keys else plain, body)
        for body in offers(plan)
    ]


def run(plan: Plan) -> Measured:
    """Send all requests of a plan, one at a time on each connection, and measure."""
    waiting = deque(requests(plan))
    poll = select.epoll()
    opened = [Connection(plan.port) for _ in range(plan.connections)]
    connections = {each.socket.fileno(): each for each in opened}
    for descriptor in connections:
        poll.register(descriptor, select.EPOLLIN)
    latencies: list[float] = []
    statuses: Counter[bytes] = Counter()
    taken = 0
    cpu, began = time.process_time(), time.perf_counter()
    for connection in connections.values():
        connection.send(waiting.popleft())
    while len(latencies) < plan.count:
        ready = poll.poll(PATIENCE_S)
        if not ready:
            raise TimeoutError(f"no response for {PATIENCE_S:g} s")
        for descriptor, _ in ready:
            connection = connections[descriptor]
            answer = connection.receive()
            if answer is None:
                continue
            latencies.append(time.perf_counter() - connection.sent_at)
            if waiting:
                connection.send(waiting.popleft())
            statuses[answer[9:12]] += 1
            taken += answer.find(b'"accepted":true') >= 0
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    poll.close()
    for connection in connections.values():
        connection.socket.close()
    by_status = {status.decode(): count for status, count in statuses.items()}
    return Measured(seconds=seconds, cpu_s=cpu, latencies=latencies, statuses=by_status, accepted=taken)


class Generator:
    """The process that sends the load, on one core."""

    def __init__(self, core: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(
            1, mp_context=context, initializer=os.sched_setaffinity, initargs=(0, {core})
        )

    def measure(self, plan: Plan) -> Measured:
        """Run one round."""
        return self._pool.submit(run, plan).result()

    def close(self) -> None:
        """End the process."""
        self._pool.shutdown()
