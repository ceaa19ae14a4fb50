"""Allowed validators: an allow-list, and the subnet's stakes from a file that another program updates."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Final

from msgspec import Struct

from gateway.telemetry.refusals import RefusalReason
from gateway.upstream.hotkeys import AddressError, public_key
from gateway.watched_file import WatchedFile
from shared.errors import SettingsError
from shared.logs import TroubleLog, get_logger
from shared.messages.encoding import decoder
from shared.settings import Settings

POLL_S: Final = 5.0  # poll interval for changes of the file
LARGEST_FILE: Final = 64 << 20

log = get_logger()


class ValidatorNode(Struct, frozen=True):
    """One node of the subnet in fiber's nodes.json; its other fields are not used."""

    hotkey: str
    stake: float


_decode = decoder(dict[str, ValidatorNode])


class Validators:
    """The allowed validators. If the file can't be read, the previous stakes stay."""

    def __init__(self, allowed: tuple[str, ...], nodes_file: Path | None, min_stake: float) -> None:
        for address in allowed:
            try:
                public_key(address)
            except AddressError as error:
                raise SettingsError(f"upstream_validators: {error}") from error
        self._allowed = frozenset(allowed)
        self._file = WatchedFile(nodes_file, _read) if nodes_file is not None else None
        self._min_stake = min_stake
        self._stakes: dict[str, float] = {}
        self._trouble = TroubleLog()

    def why_not(self, address: str) -> tuple[RefusalReason, str] | None:
        """Return None if this validator is allowed, else the reason, also in upstream's words."""
        if address in self._allowed:
            return None
        stake = self._stakes.get(address)
        if stake is None:
            return RefusalReason.UNKNOWN, "Hotkey not found in metagraph"
        if not stake >= self._min_stake:
            return RefusalReason.STAKE, f"Insufficient stake of {stake}"
        return None

    async def follow(self) -> None:
        """Reload the file whenever it changes; runs until cancelled, also without a file."""
        while True:
            await self.refresh()
            await asyncio.sleep(POLL_S)

    async def refresh(self) -> None:
        """Reload the file if it has changed."""
        if self._file is None:
            return
        try:
            found = await self._file.poll()
        except (OSError, ValueError) as error:  # msgspec's errors are ValueErrors
            if self._trouble.is_new(error):
                log.error(f"keeping the previous stakes, {self._file.path} can't be used: {error}")
            return
        self._trouble.over()
        if found is not None:
            self._stakes = found
            log.info("stakes read", file=str(self._file.path), nodes=len(self._stakes))


def validators_of(settings: Settings) -> Validators:
    """Return the validators that the settings name. Raises SettingsError."""
    file = settings.upstream_nodes_file
    return Validators(
        settings.upstream_validators, Path(file).expanduser() if file else None, settings.upstream_min_stake
    )


def _read(path: Path, status: os.stat_result) -> dict[str, float]:
    """Return the file's stakes by hotkey."""
    if status.st_size > LARGEST_FILE:
        raise ValueError(f"it has {status.st_size} bytes, more than {LARGEST_FILE}")
    return {hotkey: node.stake for hotkey, node in _decode(path.read_bytes()).items()}
