"""`podium up`: run broker, gateway and every slot's node on this machine, until Ctrl-C or SIGTERM."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from podium.arguments import examples
from podium.local.gpu_split import SlotShare, split
from shared.net import LOOPBACK
from shared.settings_sources import CONFIG_VARIABLE, OF_COMPOSE, PREFIX, load_settings
from trainer_node.hardware import detect, gpu_status

if TYPE_CHECKING:
    from podium.local.stack import Stack

READY_S = 60.0
EXAMPLES = Path(__file__).parents[2] / "examples"
MODELS = Path("~/.cache/podium").expanduser()


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `up` to the command line."""
    parser = subparsers.add_parser(
        "up",
        help="run everything on this machine",
        description=__doc__,
        epilog=examples("podium up", "podium up --data-dir /data/podium --port 7999"),
    )
    parser.add_argument("--data-dir", help="folder for all persistent data (PODIUM_DATA_DIR)")
    parser.add_argument("--port", type=int, help="the gateway's port, 0 = any free one (PODIUM_GATEWAY_PORT)")
    parser.add_argument("--nats-port", type=int, help="the broker's port on loopback, 0 = any free one")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run until a signal arrives; exit code 0 if everything was drained."""
    overrides: dict[str, Any] = {}
    if args.data_dir is not None:
        overrides["data_dir"] = args.data_dir
    if args.port is not None:
        overrides["gateway_port"] = args.port
    if args.nats_port is not None:
        overrides["nats_url"] = f"nats://{LOOPBACK}:{args.nats_port}"
    asyncio.run(up(overrides))
    return 0


async def up(overrides: dict[str, Any]) -> None:
    """Start the stack, print its addresses, keep it running until SIGINT or SIGTERM, drain it."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    stack = await make_stack(overrides, os.environ)
    asked = asyncio.create_task(stop.wait())
    serving = asyncio.create_task(_serve(stack))
    try:
        await asyncio.wait({asked, serving}, return_when=asyncio.FIRST_COMPLETED)
        if serving.done():
            serving.result()
    finally:
        for task in (asked, serving):
            task.cancel()
        await asyncio.gather(asked, serving, return_exceptions=True)
        if stack.services:
            print("stopping: running jobs write a checkpoint and resume at the next `podium up`", flush=True)
        await stack.stop()


async def make_stack(overrides: dict[str, Any], environ: Mapping[str, str]) -> Stack:
    """Make the stack for this machine, and print what was found and assumed.

    By default models come from the cache and local data from the examples.
    """
    from gateway.policy.loader import load_policy
    from podium.local.stack import Stack

    settings = load_settings(environ, **overrides)
    load_policy(settings.policy)  # fail here: a wrong policy would make the gateway exit in a loop
    chosen = chosen_settings(environ) | overrides.keys()
    defaults: dict[str, Any] = {"models_dir": str(MODELS)}
    if EXAMPLES.is_dir():
        defaults["dataset_roots"] = (str(EXAMPLES),)
    defaults = {key: value for key, value in defaults.items() if key not in chosen}
    settings = msgspec.structs.replace(settings, **defaults)
    gpus = await gpu_status(settings.gpus) if settings.hardware in ("auto", "gpu") else []
    if not gpus:
        await detect(settings)  # raises if GPUs are wanted: else each node would exit, again and again
    assignment = split(settings, gpus, expectation_set="expected_hardware" in chosen)
    for note in assignment.notes:
        print(note)
    return Stack(settings, assignment, print)


def chosen_settings(environ: Mapping[str, str]) -> set[str]:
    """Return the names of the settings that the environment or its TOML file sets (both are valid)."""
    given = {name for name, text in environ.items() if name.startswith(PREFIX) and text.strip()}
    names = {name.removeprefix(PREFIX).lower() for name in given - OF_COMPOSE}
    if path := environ.get(CONFIG_VARIABLE):
        names |= tomllib.loads(Path(path).expanduser().read_text()).keys()
    return names


async def _serve(stack: Stack) -> None:
    """Start, print the addresses, and run until a service can't be kept running."""
    await stack.start()
    await stack.ready(READY_S)
    broker = f"{LOOPBACK}:{stack.broker_port}" if stack.broker_port else stack.settings.nats_url
    slots = ", ".join(_describe(share) for share in stack.split.shares)
    print(f"gateway  {stack.url}\nbroker   {broker}\nslots    {slots}")
    print(f"data     {stack.folder} (logs in {stack.folder / 'logs'})", flush=True)
    await stack.wait()


def _describe(share: SlotShare) -> str:
    return (
        f"{share.slot} (GPUs {share.gpus})" if share.gpus else f"{share.slot} (CPU, {share.threads} threads)"
    )
