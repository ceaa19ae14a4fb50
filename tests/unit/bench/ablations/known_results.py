"""Results of ablations whose losses are known."""

from bench.ablations.trainer import VariantResult
from bench.ablations.variants import Training, Variant
from bench.arena.task import Task

CLEAN = Task("wordnet", "llama", 10, 8.0, 0)
DAMAGED = Task("wordnet", "llama", 10, 8.0, 0, "noise")
OTHER = Variant("batch 8", Training(batch=8))


def result(variant: Variant, *losses: float) -> VariantResult:
    """Return a variant's losses, row by row."""
    return VariantResult(variant, list(losses), 1.0)
