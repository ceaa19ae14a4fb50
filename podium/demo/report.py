"""Report of the demo: losses on held-out files, as a table and as one line of JSON."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import msgspec
from msgspec import Struct
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from shared.errors import PodiumError
from shared.messages import DatasetType, Result, ResultStatus
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


def report(console: Console, rows: list[Row], overlap_s: float) -> bool:
    """Print the table, the problems and the JSON line; return whether everything is as expected."""
    table = Table(title="podium demo", show_lines=True)
    for column in ("task", "slot", "decision", "base loss", "final loss", "tokens/s", "to spare", "artifact"):
        table.add_column(column, overflow="fold")
    for row in rows:
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
    troubles = [f"{row.task}: {row.trouble}" for row in rows if row.trouble]
    if overlap_s <= 0:
        troubles.append("the two jobs did not run at the same time")
    console.print(f"both jobs ran for {overlap_s:.0f} s at the same time", highlight=False)
    for trouble in troubles:
        console.print(f"FAILED: {trouble}", style="red", markup=False, highlight=False)
    print(json_line(rows, overlap_s, not troubles), flush=True)
    return not troubles


def json_line(rows: list[Row], overlap_s: float, well: bool) -> str:
    """Return the table's figures as one JSON object."""
    tasks = [{name: getattr(row, name) for name in FIGURES} for row in rows]
    return json.dumps({"ok": well, "overlap_s": round(overlap_s, 1), "tasks": tasks})


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
