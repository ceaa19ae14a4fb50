"""A model's family: by its name, or by the config of a local copy if there is one."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec

from shared.logs import get_logger
from shared.planning.model_family import find_family
from shared.settings import Settings

READ_S = 5.0  # a folder on a disk that hangs must not keep a gateway from starting
LARGEST_CONFIG = 1 << 20

# Families whose configs name another's architecture: the name is then more precise, and gives the same
# result on a gateway without a copy.
_BUILT_ON = {"llama": {"smollm", "yi", "deepseek"}, "gpt-neo": {"pythia"}}

log = get_logger()


@lru_cache(maxsize=4096)
def model_family(model: str) -> str:
    """Return a model's family, such as `llama`, from its upstream id or path; `other` if unrecognised."""
    name = model.lower().rstrip("/").rpartition("/")[2]
    return _first_found(name, model.lower()) or "other"


def config_family(config: Mapping[str, Any]) -> str | None:
    """Return the family of the architecture in a model's `config.json`; None if it is unknown."""
    architectures = config.get("architectures")
    named = [config.get("model_type"), *(architectures if isinstance(architectures, list) else [])]
    return _first_found(
        *(text.lower().removesuffix("forcausallm") for text in named if isinstance(text, str))
    )


def family_of_copy(model: str, config: Mapping[str, Any]) -> str:
    """Return the family of a model whose config is known; the config overrides the name."""
    named, built = model_family(model), config_family(config)
    return named if built is None or named in _BUILT_ON.get(built, ()) else built


class Families:
    """Families of models: by config if this machine has a copy, read once; else by name."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._known: dict[str, str] = {}  # by upstream id, or by the folder's name in lower case

    def __call__(self, model: str) -> str:
        """Return the family of an upstream id; a dict lookup."""
        flat, name = model.replace("/", "--").lower(), model.rpartition("/")[2].lower()
        for key in (model, flat, name):
            if (family := self._known.get(key)) is not None:
                return family
        return model_family(model)

    async def load(self) -> None:
        """Read the configs of the local copies, in a thread; without them names have to do."""
        try:
            async with asyncio.timeout(READ_S):
                self._known = await asyncio.to_thread(read_families, self._settings)
        except TimeoutError:
            log.warning("can't read local models in time; families come from names", waited_s=READ_S)


def read_families(settings: Settings) -> dict[str, str]:
    """Read families by upstream id (`models`) and folder name (`models_dir`) from configs. Blocks."""
    copies = {model: Path(path).expanduser() for model, path in settings.models.items()}
    if settings.models_dir:
        copies = _folders(Path(settings.models_dir).expanduser()) | copies
    found = {}
    for model, path in copies.items():
        if (config := _config(path)) is not None:
            found[model] = family_of_copy(model.replace("--", "/"), config)
    return found


def _folders(models: Path) -> dict[str, Path]:
    try:
        return {path.name.lower(): path for path in sorted(models.iterdir())}
    except OSError as error:
        log.warning("can't list models_dir; families come from names", error=str(error))
        return {}


def _config(folder: Path) -> dict[str, Any] | None:
    """Return the config of a model folder; None for anything else, such as a GGUF file."""
    path = folder / "config.json"
    try:
        if not path.is_file():
            return None
        with path.open("rb") as file:
            return msgspec.json.decode(file.read(LARGEST_CONFIG), type=dict[str, Any])
    except (OSError, ValueError, RecursionError) as error:
        log.warning("can't read a model's config; its family comes from its name", error=f"{path}: {error}")
        return None


def _first_found(*texts: str) -> str | None:
    return next(filter(None, map(find_family, texts)), None)
