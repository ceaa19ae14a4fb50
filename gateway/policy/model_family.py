"""A model's family, and whether it can be trained: by its config here or on the hub, or by its name."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from gateway.policy.hub_models import HubModels
from shared.logs import get_logger
from shared.planning.architectures import LARGEST_CONFIG, ModelFacts, facts_from_config
from shared.planning.model_name import find_family
from shared.settings import Settings

READ_S = 5.0  # a folder on a disk that hangs must not keep a gateway from starting
ADAPTER_ONLY = "its folder holds an adapter without the model that it belongs to"

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


class LocalModel(Struct, frozen=True):
    """What the config of a local copy says about a model."""

    family: str
    facts: ModelFacts


class Families:
    """Families of models, and what else is known: by config if this machine has a copy, read once.

    The hub is asked whether a model can be trained, but families don't depend on whether it answers.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._hub = HubModels(settings)
        self._known: dict[str, LocalModel] = {}  # by upstream id, or by the folder's name in lower case

    def __call__(self, model: str) -> str:
        """Return the family of an upstream id; a dict lookup."""
        found = self._find(model)
        return model_family(model) if found is None else found.family

    def facts(self, model: str) -> ModelFacts | None:
        """Return what the config of a local copy says, else the hub's; None if neither is known."""
        found = self._find(model)
        return self._hub.facts(model) if found is None else found.facts

    def is_here(self, model: str) -> bool:
        """Return whether this machine has a copy of a model."""
        return self._find(model) is not None

    async def look(self, model: str) -> None:
        """Ask the hub for the config of a model without a local copy; ends in time and never raises."""
        if self._find(model) is None:
            await self._hub.look(model)

    def _find(self, model: str) -> LocalModel | None:
        flat, name = model.replace("/", "--").lower(), model.rpartition("/")[2].lower()
        return next((self._known[key] for key in (model, flat, name) if key in self._known), None)

    async def load(self) -> None:
        """Read the configs of the local copies, in a thread; without them names have to do."""
        try:
            async with asyncio.timeout(READ_S):
                self._known = await asyncio.to_thread(read_local_models, self._settings)
        except TimeoutError:
            log.warning("can't read local models in time; families come from names", waited_s=READ_S)


def read_local_models(settings: Settings) -> dict[str, LocalModel]:
    """Read configs of local copies, by upstream id (`models`) and folder name (`models_dir`). Blocks."""
    copies = {model: Path(path).expanduser() for model, path in settings.models.items()}
    if settings.models_dir:
        copies = _folders(Path(settings.models_dir).expanduser()) | copies
    found = {}
    for model, path in copies.items():
        name = model.replace("--", "/")
        if (config := _config(path)) is not None:
            found[model] = LocalModel(family_of_copy(name, config), facts_from_config(config))
        elif (path / "adapter_config.json").is_file():
            found[model] = LocalModel(model_family(name), ModelFacts(ADAPTER_ONLY))
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
