"""The exact versions that an entry's image installs: those of this environment, which the tests ran with."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, distribution
from typing import Final

from shared.errors import SettingsError

# What the runner and the engine import. torch comes first and alone, as the largest layer of the image.
ROOTS: Final = (
    *(
        "torch",
        "transformers",
        "peft",
        "accelerate",
        "huggingface_hub",
        "safetensors",
        "gguf",
        "sentencepiece",
        "protobuf",
        "pyarrow",
    ),
    *("msgspec", "structlog"),
)
NAME: Final = re.compile(r"[A-Za-z0-9._-]+")


def pinned() -> list[str]:
    """Return `name==version` of what an entry needs, with all that those need. Raises SettingsError."""
    found: dict[str, str] = {}
    waiting = list(ROOTS)
    while waiting:
        name = _normal(waiting.pop())
        if name in found:
            continue
        try:
            installed = distribution(name)
        except PackageNotFoundError as error:
            if name in map(_normal, ROOTS):
                raise SettingsError(
                    f"{name} is not installed here, so its version can't be pinned: pip install '.[trainer]'"
                ) from error
            continue  # for another platform, or optional
        found[name] = installed.version.partition("+")[0]  # without the kind of build, such as +cpu
        waiting += [requirement for requirement in installed.requires or [] if "extra ==" not in requirement]
    first = [f"torch=={found.pop('torch')}"]
    return first + [f"{name}=={version}" for name, version in sorted(found.items())]


def _normal(requirement: str) -> str:
    """Return the package's name as registries compare it."""
    found = NAME.match(requirement)
    return re.sub(r"[-_.]+", "-", found[0] if found else requirement).lower()
