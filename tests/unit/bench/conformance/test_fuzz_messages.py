from __future__ import annotations

import random
import re

from bench.conformance import fuzz_bytes
from bench.conformance.contract_cases import all_cases
from bench.conformance.fuzz_messages import Mutator

PATHS = (
    "/task_offer/",
    "/task_offer_image/",
    "/start_training/",
    "/start_training_grpo/",
    "/start_training_image/",
    "/get_latest_model_submission/",
    "/training_repo/",
    "/v1/offers",
    "/v1/tasks/",
    "/v1/slots",
    "/v1/gateway",
    "/v1/scores",
    "/v1/tables",
    "/metrics",
)


def test_every_endpoint_is_met_and_every_request_has_a_frame() -> None:
    mutator = Mutator(random.Random(0))
    made = [mutator.next() for _ in range(3000)]
    for path in PATHS:
        assert any(path.encode() in request.data.partition(b"\r\n")[0] for request in made), path
    for request in made:
        head, _, body = request.data.partition(b"\r\n\r\n")
        line = head.partition(b"\r\n")[0]
        assert re.fullmatch(rb"[A-Z]+ /[!-~]* HTTP/1\.1", line), line
        length = re.search(rb"^Content-Length: (\d+)$", head, re.MULTILINE)
        assert int(length[1] if length else 0) == len(body)


def test_every_kind_of_bytes_is_made() -> None:
    chance = random.Random(0)
    for maker in fuzz_bytes.MAKERS:
        assert all(maker(chance).pieces for _ in range(20))


def test_the_contracts_cases_are_many_and_none_expects_a_failure() -> None:
    cases = all_cases()
    assert len(cases) > 200
    assert all(status < 500 for case in cases for status in case.expected)
