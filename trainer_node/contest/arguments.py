"""What upstream tells a contest container: its arguments and its environment. Pure.

Upstream adds arguments from time to time: unknown ones are kept for the log and otherwise ignored. A task
type that the engine doesn't know is no error here: an untrained adapter can be submitted for it.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import msgspec
from msgspec import Struct

from shared.errors import SettingsError
from shared.messages.offers import DatasetType, TaskType

PROFILES = "PODIUM_CONTEST_PROFILES"  # which profiles to train with, the fallbacks after the first
ROOT = "PODIUM_CONTEST_ROOT"  # a folder that the mounts lie in, for runs without a container
USUAL_PROFILES = ("auto", "lora_r16")
LONGEST_HOURS = 24.0 * 7


class ContestTask(Struct, frozen=True, kw_only=True):
    """One task as upstream's runtime describes it to a container."""

    task_id: str
    model: str  # an anonymous id, or a hub id
    task_type: str  # upstream's word, which may be none of TaskType
    dataset_type: DatasetType
    expected_repo_name: str
    hours: float
    profiles: tuple[str, ...] = USUAL_PROFILES
    root: str = "/"
    stats_path: str | None = None
    kl_coefficient: float | None = None
    ignored: tuple[str, ...] = ()  # arguments that mean nothing here

    @property
    def trainable(self) -> TaskType | None:
        """Return the type of task if the engine may know it."""
        try:
            return TaskType(self.task_type)
        except ValueError:
            return None


class _Parser(argparse.ArgumentParser):
    """Raises instead of ending the process."""

    def error(self, message: str) -> NoReturn:
        raise SettingsError(f"the container's arguments are not those of a text task: {message}")


def parse(arguments: Sequence[str], environment: Mapping[str, str]) -> ContestTask:
    """Read arguments and environment. Raises SettingsError that names what is missing or wrong."""
    parser = _Parser(prog="podium contest", allow_abbrev=False)
    for name in ("--task-id", "--model", "--task-type", "--expected-repo-name", "--hours-to-complete"):
        parser.add_argument(name, required=True)
    for name in ("--dataset", "--file-format"):  # the data is at a fixed path, whatever they say
        parser.add_argument(name)
    parser.add_argument("--dataset-type", default="{}")
    args, ignored = parser.parse_known_args(list(arguments))
    return ContestTask(
        task_id=_part(args.task_id, "--task-id"),
        model=args.model,
        task_type=args.task_type,
        dataset_type=dataset_type(args.dataset_type),
        expected_repo_name=_part(args.expected_repo_name, "--expected-repo-name"),
        hours=_hours(args.hours_to_complete),
        profiles=tuple(environment.get(PROFILES, "").split()) or USUAL_PROFILES,
        root=environment.get(ROOT, "/"),
        stats_path=environment.get("BASELINE_STATS_PATH") or None,
        kl_coefficient=_coefficient(environment),
        ignored=tuple(ignored),
    )


def dataset_type(text: str) -> DatasetType:
    """Read upstream's JSON of a dataset type: every field, most of them null, and some of other tasks.

    A field that no column can be (GRPO's list of functions, say) is left out, not refused.
    """
    try:
        fields = msgspec.json.decode(text)
    except (ValueError, RecursionError) as error:  # bytes that are no UTF-8 are surrogates in an argument
        raise SettingsError(f"--dataset-type is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise SettingsError(f"--dataset-type must be a JSON object, not {type(fields).__name__}")
    known = {name: fields[name] for name in DatasetType.__struct_fields__ if _is_text(fields.get(name))}
    return DatasetType(**known)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _part(value: str, name: str) -> str:
    """Return a value that becomes one part of a path."""
    if not value or value in (".", "..") or "/" in value or "\0" in value:
        raise SettingsError(f"{name} must be one name without slashes, not {value!r:.200}")
    return value


def _hours(text: str) -> float:
    try:
        hours = float(text)
    except ValueError as error:
        raise SettingsError(f"--hours-to-complete must be a number, not {text!r:.50}") from error
    if not (math.isfinite(hours) and 0.0 < hours <= LONGEST_HOURS):
        raise SettingsError(f"--hours-to-complete must be above 0 and at most {LONGEST_HOURS:g}, not {text}")
    return hours


def _coefficient(environment: Mapping[str, str]) -> float | None:
    """Return the weight of the KL term; None for a task without one, or for a value that is no number."""
    if environment.get("USE_KL", "0") not in ("1", "true", "True"):
        return None
    try:
        value = float(environment.get("KL_COEF", ""))
    except ValueError:
        return None
    return value if math.isfinite(value) and value > 0.0 else None
