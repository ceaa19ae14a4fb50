"""Handle SIGTERM: exit immediately if nothing would be lost, else at the next safe point."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

STOP_FILE: Final = "stop"  # in the run folder: for processes that each train something else


class Stop:
    """A request to stop, and how to write the outcome before an immediate exit."""

    def __init__(self, elsewhere: Callable[[], bool] = lambda: False) -> None:
        self.write_outcome: Callable[[], None] = lambda: None
        self._asked = False
        self._elsewhere = elsewhere
        self._deferred = False
        self._listens = False

    @property
    def asked(self) -> bool:
        """Return whether to stop: a signal came, or another process asks for it (`elsewhere`)."""
        return self._asked or self._elsewhere()

    def install(self, *, decides: bool = True) -> None:
        """Handle SIGTERM and SIGINT; survive the end of the node that started us, and of its terminal.

        A process that does not decide ignores both: rank 0 stops it.
        """
        self._listens = True
        signal.signal(signal.SIGTERM, self._on_signal if decides else signal.SIG_IGN)
        signal.signal(signal.SIGINT, self._on_signal if decides else signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)

    def close(self) -> None:
        """Ignore signals from here on: the outcome is about to be written and must stand.

        Ignored, not caught: when Python ends it gives caught signals back their default, which is to kill.
        """
        if self._listens:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            signal.signal(signal.SIGINT, signal.SIG_IGN)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, a signal only sets `asked`, and the code looks at it; a second signal changes nothing."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        first, self._asked = not self._asked, True
        if not first or self._deferred:
            return
        # No exception: raised between any two instructions of torch or transformers it may surface as another
        # one (seen once: a stopped run that said "failed"). What is on disk must survive kill -9 anyway.
        self.write_outcome()
        os._exit(0)
