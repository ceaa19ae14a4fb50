"""The hardware that a command without a node plans and trains for."""

from __future__ import annotations

import asyncio

from shared.messages.hardware import Hardware
from shared.planning.hardware import parse_hardware
from shared.settings_sources import load_settings
from trainer_node.hardware import detect

AUTO = "auto"
HELP = "auto = this machine's GPUs, else its CPU; or 4xH100-80GB, cpu, cpu-8x32GB (default: auto)"


def hardware_of(name: str) -> Hardware:
    """Return the hardware of a name. `auto`: as a node finds it, but a CPU with all of its cores.

    Raises SettingsError that lists the valid names, or says why GPUs can't be used.
    """
    if name.strip().lower() != AUTO:
        return parse_hardware(name)
    found = asyncio.run(detect(load_settings()))
    return parse_hardware("cpu") if found.device == "cpu" else found
