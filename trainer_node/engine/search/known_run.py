"""What an earlier start of a run left on disk about it: the record, the plan, and where its search stands."""

from __future__ import annotations

import shutil

from shared.planning.plan import Plan
from trainer_node.engine import context
from trainer_node.engine.context import RunContext, RunRecord
from trainer_node.engine.search import trial
from trainer_node.engine.search.trial import SearchRecord

Known = tuple[tuple[RunRecord, Plan] | None, SearchRecord | None]


def read_known(run: RunContext) -> Known:
    """Collective: return what an earlier start recorded, and its search; a run without a record is new.

    So is one of which a part is damaged: nobody can tell which plan its checkpoints are of. Raises OSError.
    """
    group = run.process_group
    return group.broadcast_object(_read(run) if group.is_main else (None, None))


def forget(run: RunContext) -> None:
    """Remove what a new run must not go on from. Raises OSError.

    Its own checkpoints begin at lower steps, and older ones that can't be used would be kept in their place.
    """
    if not run.process_group.is_main:
        return
    for name in ("checkpoints", "trials"):
        if (run.folder / name).exists():
            shutil.rmtree(run.folder / name)
    for name in (context.RECORD_FILE, trial.FILE):  # without its record a run is a new one
        (run.folder / name).unlink(missing_ok=True)


def _read(run: RunContext) -> Known:
    known, searched = context.read_record(run.folder), trial.read_search(run.folder)
    lost = known is None and (run.folder / context.RECORD_FILE).exists()
    lost = lost or (searched is None and (run.folder / trial.FILE).exists())
    if lost:
        run.reporter.message("what this run had written down is damaged: it begins again")
    return (None, None) if lost or known is None else (known, searched)
