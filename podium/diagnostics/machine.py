"""Gather what doctor needs to know of this machine: driver and torch, clock, hub, hotkey, address. Blocks."""

from __future__ import annotations

import ctypes
import http.client
import os
import re
import urllib.error
import urllib.request
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, Final

from msgspec import Struct

from podium.client import fetch
from shared.messages.encoding import decode
from shared.settings import Settings
from trainer_node.hardware import DRIVER, PCI, pci_gpus

TIMEOUT_S: Final = 5.0
UNSYNCHRONISED: Final = 5  # adjtimex(2): TIME_ERROR
_DRIVER_VERSION: Final = re.compile(r"Kernel Module[^\n]*?\s(\d+\.\d+(?:\.\d+)?)\s")
_CUDA: Final = re.compile(r"^cuda[^=]*=\s*(?:'([\d.]+)'|None)", re.MULTILINE)


class HubVitals(Struct, frozen=True, kw_only=True):
    """What a hub says of the token that uploads."""

    error: str | None = None  # why it could not be asked, or refused
    names: tuple[str, ...] = ()  # the user's, and those of its organisations
    may_write: bool | None = None  # None: the hub doesn't say


class MachineVitals(Struct, frozen=True, kw_only=True):
    """This machine at one moment."""

    gpus: int = 0  # that it has, with or without a driver
    driver: str | None = None  # version of the kernel's module
    torch: str | None = None  # version; None if it isn't installed
    torch_cuda: str | None = None  # CUDA's version that torch was built for; None for a CPU build
    synchronised: bool | None = None  # whether the kernel's clock follows a time source; None if unknown
    hub: HubVitals | None = None  # None if submissions don't go to one
    hotkey_error: str | None = None
    public_error: str | None = None  # why `public_address` doesn't answer


def probe_machine(settings: Settings) -> MachineVitals:
    """Gather all of it. Asks the hub and the public address, if there are any. Blocks."""
    torch, torch_cuda = probe_torch()
    return MachineVitals(
        gpus=pci_gpus(PCI),
        driver=driver_version(DRIVER),
        torch=torch,
        torch_cuda=torch_cuda,
        synchronised=clock_is_synchronised(),
        hub=probe_hub(settings) if settings.artifacts_kind == "hub" else None,
        hotkey_error=probe_hotkey(settings.hotkey),
        public_error=probe_address(settings.public_address),
    )


def driver_version(file: Path) -> str | None:
    """Return the version of the loaded NVIDIA driver, or None without one."""
    try:
        match = _DRIVER_VERSION.search(file.read_text())
    except OSError:
        return None
    return match[1] if match else "unknown"


def probe_torch() -> tuple[str | None, str | None]:
    """Return torch's version and CUDA version, by its files: importing it takes seconds."""
    try:
        found = distribution("torch")
        text = Path(str(found.locate_file("torch/version.py"))).read_text()
    except (PackageNotFoundError, OSError):
        return None, None
    match = _CUDA.search(text)
    return found.version, match[1] if match else None


def clock_is_synchronised() -> bool | None:
    """Return whether the kernel says that NTP (or another source) keeps the clock; None if it can't say."""
    try:
        zeros = ctypes.create_string_buffer(512)  # a struct timex that changes nothing
        state = ctypes.CDLL(None, use_errno=True).adjtimex(zeros)
    except (OSError, AttributeError):
        return None
    return None if state < 0 else state != UNSYNCHRONISED


def probe_hub(settings: Settings) -> HubVitals:
    """Ask the hub who the token belongs to."""
    try:
        file = settings.hub_token_file
        token = Path(file).expanduser().read_text().strip() if file else os.environ.get("HF_TOKEN", "")
    except OSError as error:
        return HubVitals(error=f"hub_token_file {file} can't be read: {error.strerror}")
    if not token:
        return HubVitals(error="there is no token: set PODIUM_HUB_TOKEN_FILE, or the variable HF_TOKEN")
    request = urllib.request.Request(f"{settings.hub_url.rstrip('/')}/api/whoami-v2")
    request.add_unredirected_header("Authorization", f"Bearer {token}")
    try:
        status, body = fetch(request, TIMEOUT_S)
        if status in (401, 403):
            return HubVitals(error=f"{settings.hub_url} refuses the token ({status})")
        answer = decode(body, dict[str, Any])
        names = (str(answer["name"]), *(str(each["name"]) for each in answer.get("orgs", ())))
        role = answer.get("auth", {}).get("accessToken", {}).get("role")
    except (OSError, http.client.HTTPException) as error:
        return HubVitals(error=f"{settings.hub_url} can't be reached: {getattr(error, 'reason', error)}")
    except (ValueError, KeyError, TypeError, AttributeError):
        return HubVitals(error=f"{settings.hub_url} answers {status}, and not as a hub does")
    return HubVitals(names=names, may_write=None if role in (None, "fineGrained") else role != "read")


def probe_hotkey(hotkey: str | None) -> str | None:
    """Return what is wrong with the hotkey's form, or None."""
    if hotkey is None:
        return None
    try:
        from gateway.upstream.hotkeys import public_key
    except ImportError:  # of podium[gateway]: this machine has no gateway
        return None
    try:
        public_key(hotkey)
    except ValueError as error:
        return str(error)
    return None


def probe_address(address: str | None) -> str | None:
    """Return why a gateway doesn't answer at its public address, or None."""
    if address is None:
        return None
    try:
        status, _ = fetch(urllib.request.Request(f"http://{address}/healthz"), TIMEOUT_S)
    except (OSError, ValueError, http.client.HTTPException) as error:
        return str(getattr(error, "reason", error))
    return None if status == 200 else f"it answers {status}, so something else listens there"
