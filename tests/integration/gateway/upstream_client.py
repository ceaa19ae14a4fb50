"""What a validator of upstream's sends, signed as it signs."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any

from bench.fake_validator.validator import keys_from_seed, signed_headers

if TYPE_CHECKING:
    from tests.integration.gateway.conftest import Api

MINER = keys_from_seed("miner").address
Answer = tuple[int, dict[str, Any]]


class Validator:
    """Asks one gateway; any header can be given another value, or left out with None."""

    keys = keys_from_seed("validator")
    address = keys.address

    def headers(self, body: bytes | None, **changed: Any) -> dict[str, str]:
        miner = changed.pop("miner", MINER)
        headers = signed_headers(self.keys, miner, body, changed.get("nonce"))
        return {name: value for name, value in (headers | changed).items() if value is not None}

    async def post(self, api: Api, path: str, message: Any, **changed: Any) -> Answer:
        body = message if isinstance(message, bytes) else json.dumps(message).encode()
        headers = self.headers(body, **changed)
        async with api.client.post(path, data=body, headers=headers, allow_redirects=False) as response:
            return response.status, await response.json()

    async def get(self, api: Api, path: str, **changed: Any) -> Answer:
        async with api.client.get(
            path, headers=self.headers(None, **changed), allow_redirects=False
        ) as response:
            return response.status, await response.json()


VALIDATOR = Validator()
SIGNED: dict[str, Any] = {"hotkey": MINER, "upstream_validators": [VALIDATOR.address]}


def offer(task_id: str, **fields: Any) -> dict[str, Any]:
    return {
        "task_id": task_id,
        "task_type": "InstructTextTask",
        "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "hours_to_complete": 3,
        "ds_size": 100000,
        "model_params_count": None,
    } | fields


def start(task_id: str, **fields: Any) -> dict[str, Any]:
    return {
        "task_id": task_id,
        "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "hours_to_complete": 3,
        "expected_repo_name": "repo-of-" + task_id,
        "dataset": "https://store.example/train.json",
        "file_format": "s3",
        "dataset_type": {"field_instruction": "instruct", "field_output": "output", "field_system": None},
    } | fields


Start = Callable[..., AbstractAsyncContextManager["Api"]]


async def accepted(api: Api, task_id: str) -> bool:
    status, answer = await VALIDATOR.post(api, "/task_offer/", offer(task_id))
    assert status == 200
    assert isinstance(answer["message"], str)
    return answer["accepted"] is True
