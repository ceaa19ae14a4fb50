"""The checks of this machine: driver and torch, clock, hub, hotkey, public address, room for large runs."""

from __future__ import annotations

from typing import Final

from podium.diagnostics.findings import Found, Severity
from podium.diagnostics.probe import Vitals
from shared.net import LOOPBACK_HOSTS

# CUDA's major version -> the oldest Linux driver that runs it (NVIDIA, "CUDA minor version compatibility").
OLDEST_DRIVER: Final = {11: (450, 80, 2), 12: (525, 60, 13), 13: (580, 65, 6)}
# A dense run of 8 billion weights (docs/guarantees.md), 7 of them trained (`podium plan`): a checkpoint of
# 84 GB next to the one before it, of which the moments may be narrowed (56 GB), and an export of 16 GB.
LARGE_RUN_BYTES: Final = (84 + 56 + 16) * 10**9
LARGE_RUN: Final = "a dense run of an 8B model"


def check_devices(vitals: Vitals) -> Found:
    """Check that a driver serves the GPUs, and that torch was built for it."""
    machine, hardware = vitals.machine, vitals.settings.hardware
    if not machine.gpus and machine.driver is None:
        return []
    found = Found()
    if machine.driver is None:
        what = f"this machine has {machine.gpus} NVIDIA GPU(s), and no driver is loaded"
        severity = Severity.NOTE if hardware == "cpu" else Severity.ERROR
        return [(severity, what, "install or repair the driver; nodes refuse to start until then")]
    if machine.torch is not None and machine.torch_cuda is None:
        what = f"torch {machine.torch} is a build for CPUs, and this machine has a driver for GPUs"
        found.append(
            (Severity.ERROR, what, "install torch from PyPI: its wheels for Linux are built for CUDA")
        )
    elif machine.torch_cuda is not None and (oldest := _oldest_driver(machine.torch_cuda)):
        driver = _numbers(machine.driver)
        if driver and driver < oldest:
            wanted = f"{oldest[0]}.{oldest[1]:02d}.{oldest[2]:02d}"
            what = f"driver {machine.driver} is too old for torch's CUDA {machine.torch_cuda}"
            found.append(
                (Severity.ERROR, what, f"install driver {wanted} or newer, or an older build of torch")
            )
    return found


def check_hub(vitals: Vitals) -> Found:
    """Check that the hub takes the token that uploads, and lets it write where submissions go."""
    hub, namespace = vitals.machine.hub, vitals.settings.hub_namespace
    if hub is None:
        return []
    if hub.error is not None:
        return [
            (Severity.ERROR, f"submissions can't be uploaded: {hub.error}", "docs/security.md has the token")
        ]
    found = Found()
    if namespace not in hub.names:
        what = f"the token belongs to {', '.join(hub.names)}, and submissions go to {namespace!r}"
        found.append((Severity.ERROR, what, "set PODIUM_HUB_NAMESPACE, or use a token of that account"))
    if hub.may_write is False:
        found.append((Severity.ERROR, "the hub's token may only read", "make one that may write"))
    return found


def check_hotkey(vitals: Vitals) -> Found:
    """Check that a gateway for upstream has a hotkey that can be one."""
    settings, error = vitals.settings, vitals.machine.hotkey_error
    if error is not None:
        do = "PODIUM_HOTKEY is the miner's own ss58 address"
        return [(Severity.ERROR, f"the hotkey can't be used: {error}", do)]
    named = bool(settings.upstream_validators) or settings.upstream_nodes_file is not None
    if named and settings.hotkey is None and settings.upstream_auth == "signed":
        what = "validators are configured and no hotkey: each of their requests is refused"
        return [(Severity.ERROR, what, "set PODIUM_HOTKEY to the miner's ss58 address")]
    if settings.hotkey is not None and not named:
        what = "a hotkey is set and no validator is known: each of their requests is refused"
        return [(Severity.ERROR, what, "set PODIUM_UPSTREAM_NODES_FILE or PODIUM_UPSTREAM_VALIDATORS")]
    return []


def check_reachability(vitals: Vitals) -> Found:
    """Check that upstream can reach the gateway at the address that is posted on chain."""
    settings, error = vitals.settings, vitals.machine.public_error
    if settings.public_address is not None:
        if error is None:
            return []
        what = f"no gateway answers at {settings.public_address}, the public address: {error}"
        if _listens_on_loopback(vitals):
            what += f"; the gateway listens on {settings.gateway_host} only"
        do = "bind PODIUM_GATEWAY_HOST or publish the port (PODIUM_PUBLISH in compose), open the firewall"
        return [(Severity.ERROR, what, f"{do}; a router may hide it from this machine alone")]
    if settings.hotkey is None:
        return []
    do = "set PODIUM_PUBLIC_ADDRESS to the host:port that is posted on chain: doctor then tries it"
    if _listens_on_loopback(vitals):
        what = f"the gateway listens on {settings.gateway_host} only: without a proxy no validator reaches it"
        return [(Severity.WARNING, what, do)]
    return [(Severity.NOTE, "whether validators can reach the gateway is not known", do)]


def _listens_on_loopback(vitals: Vitals) -> bool:
    """Return whether the gateway is known to listen on loopback only.

    A default says nothing: systemd's socket or compose may decide, and neither shows in this environment.
    """
    return "gateway_host" in vitals.chosen and vitals.settings.gateway_host in LOOPBACK_HOSTS


def check_time_source(vitals: Vitals) -> Found:
    """Check that the kernel's clock follows a time source."""
    if vitals.machine.synchronised is not False:
        return []
    what = "nothing keeps this machine's clock: the kernel reports it as not synchronised"
    do = "enable NTP: `timedatectl set-ntp true`, or chrony; deadlines and signatures need the time"
    return [(Severity.WARNING, what, do)]


def check_large_run(vitals: Vitals) -> Found:
    """Check that the node's disk has room for what the largest plan writes; only where GPUs could run it."""
    if not vitals.machine.gpus:
        return []
    node = str(vitals.settings.node)
    for folder in vitals.folders:
        if folder.path == node and folder.error is None and folder.free < LARGE_RUN_BYTES:
            what = (
                f"{folder.free / 1e9:.0f} GB are free for {node}, and {LARGE_RUN} writes "
                f"{LARGE_RUN_BYTES / 1e9:.0f} GB"
            )
            do = "use a larger disk; with less, checkpoints hold less, and a resume is not exact"
            return [(Severity.WARNING, what, do)]
    return []


def _oldest_driver(cuda: str) -> tuple[int, ...] | None:
    numbers = _numbers(cuda)
    return OLDEST_DRIVER.get(numbers[0]) if numbers else None


def _numbers(version: str) -> tuple[int, ...]:
    """Return the numbers of a version; none if it has other parts."""
    parts = version.split(".")
    return tuple(map(int, parts)) if all(map(str.isdigit, parts)) else ()
