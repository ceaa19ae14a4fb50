"""The hardware that upstream's runtime gave to this container."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from msgspec.structs import replace

from shared.errors import SettingsError
from shared.logs import get_logger
from shared.messages.hardware import Hardware
from shared.planning.hardware import parse_hardware
from shared.settings import Settings
from trainer_node.hardware import detect, short_name

DRIVER_GPUS: Final = Path("/proc/driver/nvidia/gpus")
USUAL_MEMORY: Final = 80  # GB of the validators' H100s, where only the driver's list can be read

log = get_logger()


async def hardware_of(settings: Settings, gpus: Path = DRIVER_GPUS) -> Hardware:
    """Return the container's hardware; GPUs are found even where the image got no nvidia-smi.

    A container whose tools are missing would otherwise train on its CPU, on a machine with 8 GPUs. Raises
    SettingsError if the setting `hardware` can't be read.
    """
    if settings.hardware != "auto":
        return await detect(settings)
    try:
        found = await detect(settings)
    except SettingsError as error:
        log.warning("the GPUs can't be listed; reading the driver's own list", error=str(error))
    else:
        if found.device != "cpu":
            return found
    return from_driver(gpus) or await detect(replace(settings, hardware="cpu"))


def from_driver(folder: Path) -> Hardware | None:
    """Return the GPUs that the NVIDIA driver lists in /proc, or None without any."""
    names = []
    for path in sorted(folder.glob("*/information")) if folder.is_dir() else []:
        if found := re.search(r"^Model:\s*(.+)$", path.read_text(errors="replace"), re.MULTILINE):
            names.append(found[1].strip())
    if not names:
        return None
    size = re.search(r"(\d+)\s?GB", names[0])
    memory = int(size[1]) if size else USUAL_MEMORY
    return parse_hardware(f"{len(names)}x{short_name(names[0])}-{memory}GB")
