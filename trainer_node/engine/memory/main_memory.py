"""Main memory: a slot's share of the machine's, and who may hold how much of that while training goes on.

All processes of a slot together may hold, of the slot's memory (on a CPU: of the machine's):

| what | GPUs | CPU |
| --- | --- | --- |
| copies that checkpoints are written from, the average of the weights among them | .4 | .1 |
| weights at the development curve's lowest points | .1 | .1 |
| trained weights before the first step, to begin the next trial of a search with | .1 | .1 |
| weights of trials for which the disk has no room, of two trials at most | .2 | .2 |
| together | .8 | .5 |

Of sharded weights each process holds its rows. The rest is for what comes and goes: the
processes, a model while it is loaded (1.25 times its bytes over all processes), tokens, early exports, and
written files that are not on disk yet. Rounding takes its quarter after training, when the copies are freed.
"""

from __future__ import annotations

from shared.messages.runs import WorkerJob
from shared.planning.hardware import is_cpu, machine_memory

# Of the slot's memory: 12 bytes for each weight of a dense 14B model are 159 GB, of 550 on a host with 1 TiB.
CHECKPOINT_SHARE = 0.4
# Of what is free when the run begins: two slots that begin at once may leave a fifth.
FREE_SHARE = 0.4
COPY_SHARE = 0.1  # for each of the others, and for checkpoints of a CPU, whose weights are in this memory too


def slot_memory(job: WorkerJob) -> float:
    """Return the bytes of main memory that a job's processes may count on; of a CPU all of the machine's."""
    if is_cpu(job.hardware):
        return job.hardware.memory_bytes
    return job.memory_share * machine_memory()[0]  # the other slot's processes need the rest


def most_for_copy(job: WorkerJob) -> float:
    """Return the bytes that one copy of the weights may take, of all processes together."""
    return COPY_SHARE * slot_memory(job)


def most_for_checkpoints(job: WorkerJob) -> float:
    """Return the bytes that copies for checkpoints may take, of all processes together."""
    if is_cpu(job.hardware):
        return COPY_SHARE * slot_memory(job)
    return min(CHECKPOINT_SHARE * slot_memory(job), FREE_SHARE * machine_memory()[1])
