"""The entrypoint of a contest container: `python -m trainer_node.contest ARGUMENTS`, as upstream passes them.

Exit status 0 whenever a valid submission is in place, whatever happened: with another one upstream would not
upload it. 1 = there is none, 2 = the arguments are not those of a text task.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from shared.errors import SettingsError
from shared.logs import get_logger, set_up_logs
from trainer_node.contest import container_clock
from trainer_node.contest.arguments import ContestTask, parse
from trainer_node.contest.baseline_stats import read_stats
from trainer_node.contest.mounts import mounts_of
from trainer_node.contest.runner import run_task
from trainer_node.contest.submission import SubmissionFolder

log = get_logger()


def main(arguments: list[str]) -> int:
    """Run one task; return the exit status."""
    started_at = container_clock.started_at()
    set_up_logs("console", "info")
    try:
        task = parse(arguments, os.environ)
    except SettingsError as error:
        log.error(str(error))
        return 2
    mounts = mounts_of(task)
    os.environ.update(mounts.environment)
    describe(task)
    try:
        wrong = asyncio.run(run_task(task, started_at))
    except Exception:  # what is in place counts, not how this ended
        log.exception("the runner failed")
        wrong = SubmissionFolder(mounts.submission, mounts.model).objections()
    if wrong:
        log.error("there is no valid submission", objections=wrong)
        return 1
    log.info("a valid submission is in place", folder=str(mounts.submission))
    return 0


def describe(task: ContestTask) -> None:
    """Log what upstream asked for, and what of it has no effect here."""
    log.info("task", id=task.task_id, type=task.task_type, model=task.model, hours=task.hours)
    if task.ignored:
        log.warning("unknown arguments are ignored", arguments=task.ignored)
    if task.kl_coefficient is not None:
        log.info("the divergence from the base model is part of the score", coefficient=task.kl_coefficient)
    if task.stats_path is not None:
        stats = read_stats(Path(task.stats_path))
        if isinstance(stats, str):
            log.warning("the baseline statistics can't be used; they aren't needed", error=stats)
        else:
            log.info("baseline statistics", **stats.summary())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
