"""What a run says about itself: JSON lines for the node, messages for people, speed and smoothed loss."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, RLock, Thread

import structlog
from msgspec.structs import replace

from shared.files import append_lines, write_atomically
from shared.messages.encoding import encode
from shared.messages.runs import Outcome, Phase, Progress

PERIOD_S = 1.0
SAY_S = 5.0  # between two words on what a long part has done
WINDOW_S = 20.0  # tokens/s is taken over this time
SMOOTHING = 0.9  # of the loss that is shown

log = structlog.get_logger(__name__)


class Reporter:
    """Appends `Progress` lines to one file; readers take only whole ones.

    The lock is for `patience`, whose thread speaks while the main one is busy.
    """

    def __init__(self, path: Path, task: str, slot: str) -> None:
        self.last = Progress(task=task, slot=slot, phase=Phase.LOADING)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self._lost = 0
        self._written = 0.0  # never
        self._last_message_at = time.monotonic()
        self._lock = RLock()
        self._tokens: deque[tuple[float, int]] = deque()

    def phase(self, phase: Phase) -> None:
        """Report that a new phase has begun."""
        self._tokens.clear()
        self._last_message_at = time.monotonic()
        with self._lock:
            self._emit(replace(self.last, phase=phase, eta_s=None, tokens_per_s=None))

    def message(self, text: str) -> None:
        """Report something that people should know: a deviation, dropped rows, a fallback."""
        with self._lock:
            self._emit(replace(self.last, message=text))

    def resumed(self, step: int, tokens: int, base_loss: float) -> None:
        """Report where a resumed run continues."""
        with self._lock:
            self.last = replace(self.last, step=step, tokens=tokens, base_loss=base_loss)

    def skipped(self, count: int, step: int) -> None:
        """Report that a step was skipped, the run's `count`th; only the 1st, 2nd, 4th, 8th and so on."""
        text = f"step {step} changes nothing: its gradient is not finite (steps like it so far: {count})"
        with self._lock:
            self.last = replace(self.last, skipped_steps=count)
            if count & (count - 1) == 0:
                self._emit(replace(self.last, message=text))

    def restarted(self) -> None:
        """Note that training starts again from the base model, and so do the smoothed loss and the speed."""
        self._tokens.clear()
        with self._lock:
            self.last = replace(self.last, loss=None)

    def losses(self, *, base: float | None = None, dev: float | None = None) -> None:
        """Report the development metric."""
        update = {
            name: value for name, value in (("base_loss", base), ("dev_loss", dev)) if value is not None
        }
        with self._lock:
            self._emit(replace(self.last, **update))

    def alive(self, doing: str | None = None) -> None:
        """Say again where the run stands, once a second: in a long part, silence would pass for a stall.

        Every SAY_S of a part that tells what it is doing, people hear it.
        """
        with self._lock:
            if doing and time.monotonic() - self._last_message_at >= SAY_S:
                self._last_message_at = time.monotonic()
                self._emit(replace(self.last, message=doing))
            elif self.due():
                self._emit(self.last)

    @contextmanager
    def patience(self, seconds: float) -> Iterator[None]:
        """Inside, the run counts as alive for so long: for one call that can't say so itself.

        Such as reading a model from disk. A call that takes longer than it may is silent like any that hangs.
        """
        over = Event()

        def speak() -> None:
            until = time.monotonic() + seconds
            while not over.wait(PERIOD_S) and time.monotonic() < until:
                self.alive()

        speaker = Thread(target=speak, name="patience", daemon=True)
        speaker.start()
        try:
            yield
        finally:
            over.set()
            speaker.join()

    @property
    def silent_s(self) -> float:
        """Return how long ago the run last said anything."""
        return time.monotonic() - self._written

    def due(self) -> bool:
        """Return whether to report the next step; asking is cheap, reading a loss from a GPU isn't."""
        return self.silent_s >= PERIOD_S

    def step(self, step: int, progress: float, tokens: int, loss: float, lr: float, eta_s: float) -> None:
        """Report where training stands. `loss` is the mean since the last report."""
        now = time.monotonic()
        self._tokens.append((now, tokens))
        while len(self._tokens) > 2 and now - self._tokens[0][0] > WINDOW_S:
            self._tokens.popleft()
        (then, before), smooth = self._tokens[0], self.last.loss
        with self._lock:
            self._emit(
                replace(
                    self.last,
                    step=step,
                    progress=progress,
                    tokens=tokens,
                    loss=loss if smooth is None else SMOOTHING * smooth + (1 - SMOOTHING) * loss,
                    lr=lr,
                    tokens_per_s=(tokens - before) / (now - then) if now > then else None,
                    eta_s=eta_s,
                )
            )

    def _emit(self, progress: Progress) -> None:
        progress = replace(progress, at=time.time())
        self._append(progress)
        self._written = time.monotonic()
        self.last = replace(progress, message=None)

    def _append(self, progress: Progress) -> None:
        """Append a line. On a full disk it is lost; only the file's time shows then that the run is alive."""
        try:
            append_lines(self._file, encode(progress) + b"\n")
        except OSError as error:
            self._lose(progress, error)
            return
        if self._lost:
            count, self._lost = self._lost, 0
            log.warning("progress is written again", lost=count)

    def _lose(self, progress: Progress, error: OSError) -> None:
        """Log the first lost line of several, and each message; touch the file."""
        self._lost += 1
        if self._lost == 1 or progress.message:
            log.warning("a progress line can't be written", error=str(error), message=progress.message)
        with suppress(OSError):
            os.utime(self._file)


def write_outcome(folder: Path, reporter: Reporter, outcome: Outcome) -> None:
    """Write the run's outcome, with the step it reached; whole or not at all."""
    outcome = replace(outcome, step=max(outcome.step, reporter.last.step), at=time.time())
    write_atomically(folder / "outcome.json", encode(outcome))
