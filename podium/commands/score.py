"""`podium score`: compute the loss that the upstream evaluator would print for a model and a data file."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from podium.arguments import examples
from podium.dataset_type import dataset_type
from podium.training_config import TRAINED
from shared.errors import EngineError, SettingsError
from shared.messages.encoding import decode
from shared.messages.offers import DatasetType, FileFormat, TaskType, task_type_of
from shared.messages.runs import ErrorCode

if TYPE_CHECKING:
    from trainer_node.engine.data.examples import Examples

# One of them is in every folder with a tokenizer.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
)
DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


def add_parser(subparsers: Any) -> None:
    """Add the command `score`."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "score",
        help="compute the scorer's loss of a model on a data file",
        description="Print the loss that the upstream evaluator would print; the last line is JSON.",
        epilog=examples(
            "podium score --model ~/.cache/podium/smollm2-135m-instruct --adapter run1/export "
            "--data rows.jsonl --dataset-type columns.json",
            "podium score --model org/name --data https://example.org/test.json --dtype fp32 --dataset-type "
            """'{"field_instruction": "q", "field_output": "a"}'""",
        ),
    )
    parser.add_argument("--model", required=True, help="model folder, GGUF file or hub id")
    parser.add_argument("--adapter", help="PEFT adapter folder to put on the model")
    parser.add_argument(
        "--tokenizer",
        help="folder or hub id (default: that of --model; of the base model that a submission names if it "
        "has none of its own)",
    )
    parser.add_argument("--data", required=True, help="JSON, JSONL, CSV or Parquet file, or an https URL")
    parser.add_argument(
        "--dataset-type",
        required=True,
        metavar="JSON",
        help="the meaning of the columns, as in an offer; JSON or a JSON file",
    )
    parser.add_argument(
        "--task-type",
        choices=[str(kind) for kind in TRAINED],
        help="default: derived from the named columns",
    )
    parser.add_argument(
        "--dtype",
        choices=list(DTYPES),
        default="bf16",
        help="of weights and matrix products (default: bf16, as in the scorer; fp32 is close, and many times "
        "faster on a CPU without bf16 instructions)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command; exit code 2 if the dataset type is invalid, 1 if the model or data can't be used."""
    try:
        columns = dataset_type(args.dataset_type)
    except SettingsError as error:
        print(f"podium score: {error}", file=sys.stderr)
        return 2
    task_type = TaskType(args.task_type) if args.task_type else task_type_of(columns)
    try:
        loss, examples, dropped = score(
            args.model,
            args.adapter,
            args.data,
            columns,
            task_type,
            tokenizer=args.tokenizer,
            dtype=DTYPES[args.dtype],
        )
    except EngineError as error:
        print(f"podium score: {error}", file=sys.stderr)
        return 1
    for reason, count in dropped.items():
        print(f"dropped {count} rows: {reason}")
    print(json.dumps({"loss": loss, "examples": examples, "dropped": dropped, "task_type": task_type.value}))
    return 0


def _base_in(config: Path) -> str | None:
    """Return the base model that a configuration names. Raises EngineError if it can't be read."""
    try:
        fields: dict[str, Any] = decode(config.read_bytes(), dict[str, Any])
    except OSError as error:
        what = f"{config} can't be read: {error.strerror}"
        raise EngineError(ErrorCode.MODEL_UNAVAILABLE, what) from error
    except ValueError as error:
        raise EngineError(ErrorCode.MODEL_UNAVAILABLE, f"{config} is no configuration: {error}") from error
    base = fields.get("_name_or_path")
    return base if isinstance(base, str) else None


def tokenizer_of(model: str) -> str:
    """Return the place of a model's tokenizer: its own, or the base model's that its configuration names.

    A submission of whole weights has no tokenizer: the scorer uses the original one. Raises EngineError if
    neither is known.
    """
    folder = Path(model)
    if not (folder / "config.json").is_file() or any((folder / name).is_file() for name in TOKENIZER_FILES):
        return model
    base = _base_in(folder / "config.json")
    if not base or base == model:
        raise EngineError(
            ErrorCode.MODEL_UNAVAILABLE,
            f"{model} has no tokenizer: name the original model's folder or hub id with --tokenizer",
        )
    print(f"{model} has no tokenizer: that of {base} is used (--tokenizer names another)", file=sys.stderr)
    return str(base)


def score(
    model: str,
    adapter: str | None,
    data: str,
    columns: DatasetType,
    task_type: TaskType,
    *,
    tokenizer: str | None = None,
    dtype: str = "bfloat16",
) -> tuple[float, int, dict[str, int]]:
    """Return the scorer's loss, the number of examples scored, and the dropped rows by reason.

    The scorer itself computes in bf16. Preference pairs are scored against the model without the
    adapter. Raises EngineError.
    """
    import torch

    from trainer_node.engine.evaluate import metric
    from trainer_node.engine.model.adapters import load_adapter
    from trainer_node.engine.model.loading import load_model

    examples, dropped = read_examples(model, data, columns, task_type, tokenizer or tokenizer_of(model))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network: torch.nn.Module = load_model(model, dtype).to(device)
    if task_type is TaskType.DPO:
        examples = examples.with_reference(metric.reference_logprobs(network, examples))
    if adapter is not None:
        network = load_adapter(network, adapter)
    return metric.score(network, examples).loss, len(examples), dropped


def read_examples(
    model: str, data: str, columns: DatasetType, task_type: TaskType, tokenizer: str
) -> tuple[Examples, dict[str, int]]:
    """Return the examples that the scorer would score, and the dropped rows by reason; print notices."""
    from trainer_node.engine.data.columns import asked_columns
    from trainer_node.engine.data.examples import read_rows, scored_length, tokenize
    from trainer_node.engine.data.job_rows import unmet
    from trainer_node.engine.data.splits import format_of
    from trainer_node.engine.model.loading import load_config, load_tokenizer

    file_format = format_of(urlsplit(data).path) or FileFormat.JSON
    found = read_rows(data, file_format, allow_private_urls=False, asked=asked_columns(task_type, columns))
    for text in (*found.notices, *unmet(task_type, columns, found)):
        print(text, file=sys.stderr)
    examples, unusable = tokenize(
        found.rows,
        task_type,
        columns,
        load_tokenizer(tokenizer),
        scored_length(load_config(model)),
        source=data,
    )
    return examples, found.dropped | unusable
