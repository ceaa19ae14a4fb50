"""`python -m trainer_node`: one trainer node. Exit code 0 drained, 1 fatal, 2 bad settings."""

from __future__ import annotations

import asyncio
import sys

from shared.errors import PodiumError, SettingsError
from shared.logs import get_logger, set_up_logs
from shared.settings_sources import load_settings
from trainer_node.node import serve


def main() -> int:
    """Run a node until it is drained; returns the exit code."""
    try:
        settings = load_settings()
        set_up_logs(settings.log_format, settings.log_level, service="node", slot=settings.slot)
        asyncio.run(serve(settings))
    except SettingsError as error:
        print(f"podium trainer node: {error}", file=sys.stderr)
        return 2
    except PodiumError as error:
        get_logger().error("node ends", error=str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
