"""Report of the demo: losses on held-out files, as a table and as one line of JSON."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from shared.errors import PodiumError
from shared.messages.jobs import Result, ResultStatus
from shared.messages.offers import DatasetType
from shared.planning.hardware import computes_bf16, parse_hardware

BEST_RATIO = 0.75  # of the base model's loss: the most that a job may have
SCORE_S = 300.0
FIGURES = ("task", "slot", "accepted", "reason", "base_loss", "final_loss", "deadline_margin_s", "artifact")


class Row(Struct, kw_only=True):
    """The result of one offer. Losses are the scorer's metric on held-out rows."""

    task: str
    expected: bool  # the expected decision
    slot: str | None = None
    accepted: bool = False
    reason: str = ""
    as_expected: bool = False  # both decision and reason were right
    deadline_at: float = 0.0
    result: Result | None = None
    base_loss: float | None = None
    final_loss: float | None = None
    deadline_margin_s: float | None = None
    artifact: str | None = None
    tokens_per_s: float | None = None

    @property
    def trouble(self) -> str:
        """Return what is wrong with this row; empty if nothing."""
        if not self.as_expected:
            return "not the expected decision"
        if not self.expected:
            return ""
        if self.result is None:
            return "no result"
        if self.result.status is not ResultStatus.SUBMITTED:
            return f"{self.result.status}: {self.result.reason}"
        if self.deadline_margin_s is None or self.deadline_margin_s < 0:
            return "submitted after its deadline"
        if self.base_loss is None or self.final_loss is None:
            return "not scored"
        if not self.final_loss <= BEST_RATIO * self.base_loss:
            return f"final loss is {self.final_loss / self.base_loss:.2f} of base loss, above {BEST_RATIO}"
        return ""


class Played(Struct, kw_only=True):
    """One demo: its rows, how long both jobs ran at once, and how long it took until all was submitted."""

    rows: list[Row]
    overlap_s: float
    seconds: float = 0.0

    @property
    def troubles(self) -> list[str]:
        """Return everything that is not as expected."""
        found = [f"{row.task}: {row.trouble}" for row in self.rows if row.trouble]
        if self.overlap_s <= 0:
            found.append("the two jobs did not run at the same time")
        return found

    @property
    def well(self) -> bool:
        """Return whether everything is as expected."""
        return not self.troubles


def take_result(row: Row, result: Result) -> None:
    """Put a result's figures into its row."""
    row.result = result
    row.artifact = result.artifact
    row.deadline_margin_s = result.deadline_margin_s
    row.tokens_per_s = result.metrics.tokens_per_s if result.metrics else None


async def score_row(row: Row, base: Path, data: Path, columns: DatasetType) -> None:
    """Measure base model and artifact on `data`, each in a separate process."""
    if row.artifact is None:
        return
    artifact = Path(row.artifact)
    row.base_loss = await _score(["--model", str(base)], data, columns)
    if (artifact / "adapter_config.json").is_file():
        row.final_loss = await _score(["--model", str(base), "--adapter", str(artifact)], data, columns)
        return
    # A full-model submission has no tokenizer: the scorer uses the original one.
    row.final_loss = await _score(["--model", str(artifact), "--tokenizer", str(base)], data, columns)


def report(console: Console, played: Played) -> None:
    """Print the table, the problems and the JSON line."""
    table = Table(title="podium demo", show_lines=True)
    for column in ("task", "slot", "decision", "base loss", "final loss", "tokens/s", "to spare", "artifact"):
        table.add_column(column, overflow="fold")
    for row in played.rows:
        word = "accepted" if row.accepted else "refused"
        table.add_row(
            row.task,
            row.slot or "-",
            escape(f"{word}: {row.reason}"),
            _number(row.base_loss, ".3f"),
            _number(row.final_loss, ".3f"),
            _number(row.tokens_per_s, ".0f"),
            _number(row.deadline_margin_s, ".0f", " s"),
            escape(row.artifact or "-"),
        )
    console.print(table)
    console.print(f"both jobs ran for {played.overlap_s:.0f} s at the same time", highlight=False)
    for trouble in played.troubles:
        console.print(f"FAILED: {trouble}", style="red", markup=False, highlight=False)
    print(json.dumps(figures(played)), flush=True)


def figures(played: Played) -> dict[str, Any]:
    """Return the table's figures, for one JSON object."""
    tasks = [{name: getattr(row, name) for name in FIGURES} for row in played.rows]
    return {"ok": played.well, "overlap_s": round(played.overlap_s, 1), "tasks": tasks}


def compare(console: Console, played: Mapping[str, Played]) -> None:
    """Print the held-out losses and the durations of several profiles, and one JSON object of them."""
    table = Table(title="held-out loss")
    for column in ("task", "base model", *played):
        table.add_column(column, overflow="fold")
    losses = losses_of(played)
    for task, found in losses.items():
        table.add_row(task, *(_number(found.get(name), ".4f") for name in ("base", *played)))
    seconds = {name: round(one.seconds, 1) for name, one in played.items()}
    table.add_row("until all is submitted", "", *(f"{seconds[name]:.0f} s" for name in played))
    console.print(table)
    well = all(one.well for one in played.values())
    print(json.dumps({"ok": well, "losses": losses, "seconds": seconds}), flush=True)


def losses_of(played: Mapping[str, Played]) -> dict[str, dict[str, float | None]]:
    """Return the losses of every expected job: the base model's, and each profile's."""
    found: dict[str, dict[str, float | None]] = {}
    for name, one in played.items():
        for row in one.rows:
            if row.expected:
                losses = found.setdefault(row.task, {"base": row.base_loss})
                losses["base"] = row.base_loss if losses["base"] is None else losses["base"]
                losses[name] = row.final_loss
    return found


async def _score(model: list[str], data: Path, columns: DatasetType) -> float:
    names = msgspec.json.encode(
        {key: value for key, value in msgspec.structs.asdict(columns).items() if value}
    )
    # The scorer uses bf16; where a CPU emulates it, scoring would take as long as training.
    dtype = "bf16" if computes_bf16(parse_hardware("cpu")) else "fp32"
    command = [sys.executable, "-m", "podium", "score", *model, "--dtype", dtype, "--data", str(data)]
    command.append("--dataset-type")
    process = await asyncio.create_subprocess_exec(
        *command, names.decode(), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(SCORE_S):
            output, errors = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        last = errors.decode(errors="replace").strip().rpartition("\n")[2]
        raise PodiumError(f"can't score {data.name} with {model[1]}: {last}")
    return float(json.loads(output.decode().strip().rpartition("\n")[2])["loss"])


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else format(value, form) + unit
