"""The same contract as a normal FastAPI project, for comparison: pydantic, Depends, uvicorn.

    python -m bench.performance.fastapi_gateway --port 8000 [--hotkey SS58 --validator SS58] --folder DIR

One worker, uvloop and httptools, no access log; pydantic serialises responses, which FastAPI's own docs call
faster than orjson. State is in memory; only a JSON line per decision is stored (written after the response,
five times a second), and structlog writes a line to standard error. With `--hotkey` it requires signatures
as fiber does: stake, nonce, sr25519 signature, addressee, in this order, as dependencies. Runs until it is
stopped. Its packages are not Podium's: pip install --group bench.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import re
import sys
import threading
import time
from pathlib import Path
from typing import Annotated, Any

try:
    import uvicorn
    from fastapi import Depends, FastAPI, Header, HTTPException, Request

    from bench.performance.fastapi_models import (
        Decision,
        MinerSubmission,
        MinerTaskOffer,
        MinerTaskResponse,
        TaskType,
        Term,
        TrainRequest,
        TrainRequestImage,
        TrainRequestText,
        TrainResponse,
    )
except ImportError as error:
    raise SystemExit(
        f"{error.name} is missing: the reference gateway needs pip install --group bench -c constraints.txt"
    ) from error

import base58
import sr25519
import structlog

SLOTS = 2
MAX_HOURS = 96
RESERVATION_S = 900.0
NONCE_WINDOW_S = 120
MIN_STAKE = 1000.0
THRESHOLD = 0.85
FLUSH_S = 0.2

log = structlog.get_logger()


class DecisionFile:
    """A JSON line for each decision; the operating system gets them five times a second."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a")
        threading.Thread(target=self._flush_for_ever, daemon=True).start()

    def add(self, decision: Decision) -> None:
        """Note one decision."""
        self._file.write(decision.model_dump_json() + "\n")

    def _flush_for_ever(self) -> None:
        while True:
            time.sleep(FLUSH_S)
            self._file.flush()


class Miner:
    """All state: who holds the slots, and what was said."""

    def __init__(self, decisions: DecisionFile) -> None:
        self.decisions = decisions
        self.reserved: dict[str, float] = {}  # task id -> when it lapses
        self.running: dict[str, TrainRequest] = {}
        self.repos: dict[str, str] = {}

    def busy(self, now: float) -> int:
        """Slots in use."""
        return len(self.running) + sum(lapses > now for lapses in self.reserved.values())

    def decide(self, offer: MinerTaskOffer) -> Decision:
        """Decide by the house policy: capacity, hours, priority."""
        now = time.time()
        terms = self._terms(offer)
        priority = min(1.0, sum(term.value * term.weight for term in terms.values()))
        if offer.task_id in self.running or self.reserved.get(offer.task_id, 0.0) > now:
            accepted, reason = True, f"Accepted for ranking #1 optimization - priority {priority:.3f}"
        elif self.busy(now) >= SLOTS:
            accepted, reason = False, f"At maximum accuracy capacity ({SLOTS} jobs for #1)"
            log.warning(f"At maximum accuracy capacity: {self.busy(now)}/{SLOTS} jobs")
        elif offer.hours_to_complete > MAX_HOURS:
            accepted, reason = False, f"Job duration too long (>{MAX_HOURS} hours)"
        elif priority > THRESHOLD:
            accepted, reason = True, f"Accepted for ranking #1 optimization - priority {priority:.3f}"
            self.reserved[offer.task_id] = now + RESERVATION_S
        else:
            accepted, reason = False, f"Priority {priority:.3f} below #1 threshold"
        decision = Decision(
            task_id=offer.task_id,
            accepted=accepted,
            reason=reason,
            priority=priority,
            decided_at=now,
            **terms,
        )
        self.decisions.add(decision)
        log.info("offer accepted" if accepted else "offer rejected", task=offer.task_id, reason=reason)
        return decision

    def _terms(self, offer: MinerTaskOffer) -> dict[str, Term]:
        text = offer.task_type not in (TaskType.IMAGE, TaskType.GRPO)
        cause = f"{offer.task_type} is {'' if text else 'not '}supported"
        return {
            "task_weight": Term(value=0.25, weight=0.15, cause="house value"),
            "model_performance": Term(value=0.75, weight=0.15, cause=f"house value of {family(offer.model)}"),
            "task_success": Term(value=0.9, weight=0.15, cause="house value"),
            "maximum_accuracy_bonus": Term(value=float(text), weight=0.4, cause=cause),
            "h100_maximum_bonus": Term(value=1.0, weight=0.35, cause="the slots have the expected hardware"),
        }


def family(model: str) -> str:
    """Return the kind of model, by its name."""
    found = re.search(r"llama|qwen|mistral|gemma|phi|smollm", model.lower())
    return found.group() if found else "other"


class Verifier:
    """Checks requests like fiber's dependencies: stake, nonce, signature, addressee."""

    def __init__(self, hotkey: str, stakes: dict[str, float]) -> None:
        self.hotkey = hotkey
        self.stakes = stakes
        self.nonces: dict[str, float] = {}

    def nonce_is_valid(self, nonce: str) -> bool:
        """New, and of the last or next two minutes."""
        if nonce in self.nonces:
            return False
        try:
            at = int(nonce.split("_")[0]) / 1e9
        except ValueError:
            return False
        if abs(time.time() - at) > NONCE_WINDOW_S:
            return False
        self.nonces[nonce] = at
        return True

    def signature_is_valid(self, hotkey: str, signature: str, message: str) -> bool:
        """By the key that the address is made of."""
        if not signature.startswith("0x"):
            return False
        try:
            public = base58.b58decode(hotkey)[1:33]
            return bool(sr25519.verify(bytes.fromhex(signature[2:]), message.encode(), public))
        except (ValueError, TypeError):
            return False


def get_miner(request: Request) -> Miner:
    """Return the one miner of this process."""
    miner: Miner = request.app.state.miner
    return miner


def get_verifier(request: Request) -> Verifier:
    """Return the one verifier of this process."""
    verifier: Verifier = request.app.state.verifier
    return verifier


HotkeyHeader = Annotated[str, Header(alias="validator-hotkey")]
MinerHeader = Annotated[str, Header(alias="miner-hotkey")]
NonceHeader = Annotated[str, Header(alias="nonce")]
SignatureHeader = Annotated[str, Header(alias="signature")]
OneMiner = Annotated[Miner, Depends(get_miner)]
OneVerifier = Annotated[Verifier, Depends(get_verifier)]


async def blacklist_low_stake(hotkey: HotkeyHeader, verifier: OneVerifier) -> None:
    """403 for validators that nobody knows, or that have too little stake."""
    stake = verifier.stakes.get(hotkey)
    if stake is None:
        raise HTTPException(403, "Hotkey not found in metagraph")
    if stake < MIN_STAKE:
        raise HTTPException(403, f"Insufficient stake of {stake} for hotkey {hotkey}")


async def verify_request(
    request: Request,
    hotkey: HotkeyHeader,
    miner: MinerHeader,
    nonce: NonceHeader,
    signature: SignatureHeader,
    verifier: OneVerifier,
) -> None:
    """401 for a POST that its validator did not sign for us, now."""
    digest = hashlib.sha256(await request.body()).hexdigest()
    check(verifier, hotkey, miner, nonce, signature, f"{nonce}:{miner}:{digest}")


async def verify_get_request(
    hotkey: HotkeyHeader,
    miner: MinerHeader,
    nonce: NonceHeader,
    signature: SignatureHeader,
    verifier: OneVerifier,
) -> None:
    """Verify a GET, which has no body."""
    check(verifier, hotkey, miner, nonce, signature, f"{nonce}:{miner}")


def check(verifier: Verifier, hotkey: str, miner: str, nonce: str, signature: str, message: str) -> None:
    """Nonce, signature, addressee, in fiber's order."""
    if not verifier.nonce_is_valid(nonce):
        raise HTTPException(401, "Oi, that nonce is not valid!")
    if not verifier.signature_is_valid(hotkey, signature, message):
        raise HTTPException(401, "Oi, invalid signature, you're not who you said you were!")
    if miner != verifier.hotkey:
        raise HTTPException(401, "Oi, this is not meant for me!")


async def task_offer(offer: MinerTaskOffer, miner: OneMiner) -> MinerTaskResponse:
    """Text and image offers."""
    decision = miner.decide(offer)
    return MinerTaskResponse(message=decision.reason, accepted=decision.accepted)


async def start_text(request: TrainRequestText, miner: OneMiner) -> TrainResponse:
    """Take the data of a text task, GRPO included."""
    return start(request, miner)


async def start_image(request: TrainRequestImage, miner: OneMiner) -> TrainResponse:
    """Take the data of an image task."""
    return start(request, miner)


def start(request: TrainRequest, miner: Miner) -> TrainResponse:
    """Turn a reservation into a job."""
    task = str(request.task_id)
    if miner.reserved.pop(task, None) is None and task not in miner.running:
        raise HTTPException(404, "This task was not accepted, or its reservation has lapsed")
    miner.running[task] = request
    return TrainResponse(message="Training job enqueued.", task_id=request.task_id)


async def submission(task_id: str, miner: OneMiner) -> MinerSubmission:
    """Return the location of a task's model."""
    repo = miner.repos.get(task_id)
    if repo is None:
        raise HTTPException(404, f"No submission found for task {task_id}")
    return MinerSubmission(repo=repo)


async def training_repo(task_type: str) -> dict[str, Any]:
    """Return the repository of this miner's trainer."""
    return {"github_repo": "https://example.org/trainer", "commit_hash": "0" * 40}


def make_app(miner: Miner, verifier: Verifier | None) -> FastAPI:
    """Return the app with all routes; signed ones if there is a verifier."""
    app = FastAPI()
    app.state.miner, app.state.verifier = miner, verifier
    posts = [Depends(blacklist_low_stake), Depends(verify_request)] if verifier else []
    gets = [Depends(blacklist_low_stake), Depends(verify_get_request)] if verifier else []
    for path, handler in (
        ("/task_offer/", task_offer),
        ("/task_offer_image/", task_offer),
        ("/start_training/", start_text),
        ("/start_training_grpo/", start_text),
        ("/start_training_image/", start_image),
    ):
        app.add_api_route(path, handler, methods=["POST"], dependencies=posts)
    app.add_api_route("/get_latest_model_submission/{task_id}", submission, dependencies=gets)
    app.add_api_route("/training_repo/{task_type}", training_repo, dependencies=gets)
    return app


def set_up_logs() -> None:
    """JSON lines on standard error, flushed one by one."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )


def main() -> None:
    """Serve until stopped."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="where decisions.jsonl goes")
    parser.add_argument("--hotkey", help="this miner's address; asks for signatures")
    parser.add_argument("--validator", action="append", default=[], help="an address with enough stake")
    args = parser.parse_args()
    set_up_logs()
    verifier = Verifier(args.hotkey, dict.fromkeys(args.validator, 1e6)) if args.hotkey else None
    args.folder.mkdir(parents=True, exist_ok=True)
    app = make_app(Miner(DecisionFile(args.folder / "decisions.jsonl")), verifier)
    uvicorn.run(
        app,
        host="127.0.0.1",
        port=args.port,
        loop="uvloop",
        http="httptools",
        access_log=False,
        log_level="warning",
    )


if __name__ == "__main__":
    main()
