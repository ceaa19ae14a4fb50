"""Read the settings: PODIUM_* environment variables over one TOML file; unknown keys are refused."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Struct

from shared.errors import SettingsError
from shared.net import LOOPBACK_HOSTS
from shared.settings import Settings
from shared.subjects import is_slot_name

PREFIX = "PODIUM_"
CONFIG_VARIABLE = "PODIUM_CONFIG"  # path of the TOML file
GPUS_VARIABLE = "PODIUM_GPUS"  # an empty list is a value: none
# Variables of docker-compose.yml alone. deploy/podium.env has them next to settings, and serves units too.
OF_COMPOSE = frozenset(
    PREFIX + name
    for name in (
        "PUBLISH",
        "NODES_DIR",
        "DATA_ROOT",
        "TRAINER_MEMORY",
        "OPEN_FILES",
        "METRICS_KEPT",
        "PROMETHEUS_PORT",
        "GRAFANA_PORT",
    )
)
_PASSWORD = re.compile(r"(://[^/@\s]*?:|://)[^/@\s:]+@")  # a user without a password is a token


def load_settings(
    environ: Mapping[str, str] | None = None, *, file: Path | None = None, **overrides: Any
) -> Settings:
    """Read the TOML file (`file`, else $PODIUM_CONFIG), then PODIUM_*, then `overrides`; later wins.

    Raises SettingsError naming the key, its place, and the valid values.
    """
    environ = os.environ if environ is None else environ
    values: dict[str, Any] = {}
    path = file or (Path(environ[CONFIG_VARIABLE]) if environ.get(CONFIG_VARIABLE) else None)
    if path is not None:
        values |= _from_toml(path)
    values |= _from_environment(environ)
    values |= overrides
    return _checked(values)


class SettingInForce(Struct, frozen=True, kw_only=True):
    """One setting: its value here and where that comes from. A password in a URL is not shown."""

    name: str
    variable: str  # of the environment
    value: Any
    source: str  # default, the file, or environment
    default: Any
    type: str
    meaning: str


def settings_in_force(environ: Mapping[str, str] | None = None) -> list[SettingInForce]:
    """Return every setting with its value and source. Raises SettingsError as `load_settings` does."""
    environ = os.environ if environ is None else environ
    settings = load_settings(environ)
    file = environ.get(CONFIG_VARIABLE)
    of_file = _from_toml(Path(file)).keys() if file else set()
    of_environment = _from_environment(environ).keys()
    found = []
    for field in msgspec.structs.fields(Settings):
        name, annotated = field.name, _hints()[field.name]
        kind = _plain(annotated)
        default = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()
        source = "environment" if name in of_environment else str(file) if name in of_file else "default"
        found.append(
            SettingInForce(
                name=name,
                variable=PREFIX + name.upper(),
                value=without_password(getattr(settings, name)),
                source=source,
                default=default,
                type=kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind),
                meaning=_description(annotated),
            )
        )
    return found


def without_password(value: Any) -> Any:
    """Return a value with `***` for the password of a URL in it: `nats://user:***@host`."""
    return _PASSWORD.sub(r"\1***@", value) if isinstance(value, str) else value


def shown(value: Any) -> str:
    """Return a setting's value as people read it."""
    if value is None:
        return "none"
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def _from_toml(path: Path) -> dict[str, Any]:
    try:
        values = tomllib.loads(path.expanduser().read_text())
    except OSError as error:
        raise SettingsError(f"settings file {path} can't be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # tomllib's own error, or bytes that are not UTF-8
        raise SettingsError(f"settings file {path} is not TOML: {error}") from error
    for key in values:
        _must_be_known(key, f"{path}: {key}")
    return values


def _from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for variable, text in environ.items():
        if not variable.startswith(PREFIX) or variable == CONFIG_VARIABLE:
            continue
        if variable in OF_COMPOSE:
            continue
        key = variable.removeprefix(PREFIX).lower()
        _must_be_known(key, variable)
        if not text.strip() and variable != GPUS_VARIABLE:
            continue  # `PODIUM_HOTKEY=` in a file of variables: not set
        values[key] = _parse(key, text)
    return values


def _parse(key: str, text: str) -> Any:
    """Parse an environment value: JSON for tables, JSON or a comma list for lists, plain text otherwise."""
    kind = get_origin(_plain(_hints()[key]))
    if kind is tuple and not text.lstrip().startswith("["):
        return [part.strip() for part in text.split(",") if part.strip()]
    if kind in (tuple, dict):
        try:
            return msgspec.json.decode(text)
        except (ValueError, RecursionError) as error:  # bytes that are no UTF-8 are surrogates in it
            raise SettingsError(f"{PREFIX}{key.upper()} is not JSON: {error}") from error
    return text


def _checked(values: dict[str, Any]) -> Settings:
    for key in values:
        _must_be_known(key, key)
    try:
        settings = msgspec.convert(values, Settings, strict=False)
    except msgspec.ValidationError as error:
        raise SettingsError(f"a setting has a value that can't be used: {error}") from error
    for name in settings.slots:
        if not is_slot_name(name):
            raise SettingsError(f"slots: {name!r} is no name of a slot: use 1 to 32 letters, digits, - and _")
        if settings.slots.count(name) > 1:
            raise SettingsError(f"slots: {name!r} is there more than once; each slot has a name of its own")
    if settings.slot not in settings.slots:
        raise SettingsError(f"slot {settings.slot!r} is not one of slots {', '.join(settings.slots)}")
    if not settings.lease_renew_s < settings.lease_trust_s < settings.lease_ttl_s:
        raise SettingsError("lease_renew_s < lease_trust_s < lease_ttl_s must hold")
    if settings.upstream_auth == "off" and settings.gateway_host not in LOOPBACK_HOSTS:
        raise SettingsError(
            f"upstream_auth = off is for loopback only, and gateway_host is {settings.gateway_host}: "
            "set hotkey and upstream_auth = signed"
        )
    if settings.artifacts_kind == "hub" and not settings.hub_namespace:
        raise SettingsError("artifacts_kind = hub needs hub_namespace: the user that submissions go to")
    return settings


def _must_be_known(key: str, where: str) -> None:
    if key not in _hints():
        raise SettingsError(f"unknown setting {where}; `podium settings` lists the known ones")


def _hints() -> dict[str, Any]:
    return get_type_hints(Settings, include_extras=True)


def _plain(annotated: Any) -> Any:
    return get_args(annotated)[0] if get_origin(annotated) is Annotated else annotated


def _description(annotated: Any) -> str:
    metas = get_args(annotated)[1:] if get_origin(annotated) is Annotated else ()
    return next((meta.description for meta in metas if meta.description), "")
