import argparse
import json
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from podium.commands.plan import add_parser
from shared.messages.hardware import Hardware
from shared.messages.offers import TaskType
from shared.planning.feasibility import ASSUMED_PAIRS
from shared.planning.model_shape import shape_from_params
from shared.planning.plan import Plan
from shared.planning.planner import make_plan
from shared.planning.profiles import resolve

CONFIG = Path(__file__).parents[3] / "data" / "oracle" / "base" / "config.json"
RESULTS = Path(__file__).parents[4] / "docs" / "results.md"
STATS = '{"examples": 500, "tokens": 20000, "label_tokens": 9000, "max_length": 90}'


def command(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    args = parser.parse_args(["plan", *arguments])
    code: int = args.run(args)
    return code


def test_json_is_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--params", "8B", "--hardware", "4xH100-80GB", "--hours", "4", "--json") == 0
    plan = msgspec.json.decode(capsys.readouterr().out, type=Plan)
    assert (plan.parallel, plan.devices) == ("fsdp2", 4)
    assert plan.deviations


@pytest.mark.parametrize("hardware", [2, 4])
@pytest.mark.parametrize("params", ["8B", "14B"])
def test_the_results_page_has_todays_figures(
    params: str, hardware: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("--params", params, "--hardware", f"{hardware}xH100-80GB", "--hours", "4", "--json") == 0
    plan = msgspec.json.decode(capsys.readouterr().out, type=Plan)
    page = " ".join(RESULTS.read_text().split())
    assert f"{plan.memory_bytes / 2**30:.1f}" in page
    assert params != "8B" or f"{plan.expected_tokens_per_s:,.0f}" in page


def test_the_page_shows_every_deviation(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    stats = tmp_path / "stats.json"
    stats.write_text(STATS)
    arguments = ["--model-config", str(CONFIG), "--hardware", "cpu-2x8GB", "--hours", "0.5", "--data-stats"]
    assert command(*arguments, STATS, "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert command(*arguments, str(stats)) == 0
    page = " ".join(capsys.readouterr().out.split())
    assert "500 rows of 40 tokens" in page
    assert len(plan["deviations"]) > 5
    for deviation in plan["deviations"]:
        assert deviation["what"].split(",")[0].split()[0] in page


def test_a_folder_stands_for_its_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--model-config", str(CONFIG.parent), "--hardware", "cpu-2x8GB", "--hours", "1") == 0
    assert "auto on cpu" in capsys.readouterr().out


@pytest.mark.parametrize(("kind", "parallel"), [("llama", "fsdp2"), ("falcon", "ddp")])
def test_a_model_in_padded_rows_is_not_cut(
    kind: str, parallel: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.json"
    sizes = {"hidden_size": 4544, "num_hidden_layers": 32, "num_attention_heads": 71, "vocab_size": 65024}
    config.write_text(json.dumps({"model_type": kind, **sizes}))
    asked = ["--model-config", str(config), "--hardware", "4xH100-80GB", "--hours", "4", "--json"]
    assert command(*asked) == 0
    assert json.loads(capsys.readouterr().out)["parallel"] == parallel


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (["--params", "70B", "--hardware", "cpu-2x8GB", "--hours", "4"], "need at least"),
        (["--params", "8B", "--hardware", "toaster", "--hours", "4"], "unknown hardware"),
        (["--params", "8B", "--hours", "4", "--profile", "fastest"], "known profiles"),
        (["--params", "8B", "--hours", "4", "--data-stats", "{}"], "data statistics"),
        (["--params", "1B", "--hours", "4", "--kl-coef", "-1"], "from 0 on"),
        (["--params", "1B", "--hours", "4", "--kl-coef", "nan"], "from 0 on"),
        (
            ["--params", "1B", "--hours", "4", "--kl-coef", ".1", "--task-type", "DpoTask"],
            "preference pairs have no divergence",
        ),
        (["--model-config", "/nowhere/config.json", "--hours", "4"], "can't read"),
    ],
)
def test_a_clear_error_and_exit_code_1(
    arguments: list[str], cause: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(*arguments) == 1
    assert cause in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["--params", "many", "--hours", "1"], ["--params", "1B", "--hours", "0"]]
)
def test_bad_numbers_are_usage_errors(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command(*arguments)
    assert caught.value.code == 2
    assert repr(arguments[1 if arguments[1] == "many" else 3]) in capsys.readouterr().err


def test_planning_loads_no_torch() -> None:
    check = "import sys, podium.commands.plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], timeout=60, check=False).returncode == 0


@pytest.mark.parametrize(
    ("params", "hours", "says"),
    [
        ("0.5B", "2", "First: LoRA r32, rate x 1.8, 2.5 epochs"),
        ("8B", "2", "to compare rates; then at the rate that it asks for"),  # sharded
        ("70B", "2", "One training run (LoRA r256, 3.4 epochs)"),
        ("7B", "2", "short runs of"),  # 90 M tokens
        ("0.5B", ".02", "then one pass over the development rows: no time to compare"),
    ],
)
def test_a_searching_profile_says_what_it_would_try(
    params: str, hours: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    many = '{"examples": 150000, "tokens": 90000000, "label_tokens": 40000000, "max_length": 3000}'
    few = '{"examples": 20000, "tokens": 6000000, "label_tokens": 3000000, "max_length": 1000}'
    stats = many if params == "7B" else few
    arguments = ["--params", params, "--hardware", "4xH100-80GB", "--hours", hours, "--data-stats", stats]
    assert command(*arguments) == 0
    assert says in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "20000 rows of 300 tokens trained"),
        (["--task-type", "ChatTask"], "First: LoRA r32, rate x 1.8"),
        (["--kl-coef", "0"], "First: LoRA r32, rate x 1.8"),
        (
            ["--kl-coef", "0.1"],
            "20000 rows of 300 tokens, scored with a divergence from the base model trained",
        ),
        (["--kl-coef", "0.1"], "First: LoRA r32, rate x 1.8"),
        (["--kl-coef", "0.1"], "by dense and norms, or LoRA r32"),
        (["--task-type", "DpoTask"], "20000 preference pairs of 600 tokens"),
        (["--task-type", "DpoTask"], "First: dense, rate x 1, 2.5 epochs"),
    ],
)
def test_a_search_depends_on_what_is_scored(
    options: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("--params", "0.5B", "--hardware", "4xH100-80GB", "--hours", "2", *options) == 0
    assert says in " ".join(capsys.readouterr().out.split())


def test_pairs_have_the_plan_that_training_would_make_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--params", "0.5B", "--hardware", "1xH100-80GB", "--hours", "1", "--task-type", "DpoTask"]
    assert command(*options, "--json") == 0
    plan = msgspec.json.decode(capsys.readouterr().out, type=Plan)
    hardware = Hardware(device="H100", count=1, memory_bytes=80 << 30)
    shape = shape_from_params(500_000_000, "")
    recipe, pairs = resolve("auto"), TaskType.DPO
    assert plan == make_plan(recipe, shape, ASSUMED_PAIRS, hardware, 3600.0, task_type=pairs)


def test_with_few_rows_a_search_begins_with_lora(capsys: pytest.CaptureFixture[str]) -> None:
    stats = '{"examples": 250, "tokens": 20000, "label_tokens": 10000, "max_length": 200}'
    arguments = ["--params", "1B", "--hardware", "1xH100-80GB", "--hours", "1", "--data-stats", stats]
    assert command(*arguments) == 0
    assert "First: LoRA r32, " in " ".join(capsys.readouterr().out.split())
    assert command("--profile", "maximum_accuracy", *arguments) == 0
    assert "Search" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("hours", "says"),
    [
        (
            "2m",
            "1.1 epochs, batch 4. It is run again on all rows, and that run is submitted: "
            "no time to compare.",
        ),
        ("20m", "The best one on the development rows is run again on all rows, and submitted."),
    ],
)
def test_few_rows_say_that_all_of_them_are_trained_on_in_the_end(
    hours: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    stats = '{"examples": 120, "tokens": 6000, "label_tokens": 3000, "max_length": 180}'
    half = ["--params", "0.135B", "--hardware", "cpu-2x24GB", "--hours", hours]
    assert command("--profile", "auto", *half, "--data-stats", stats) == 0
    assert says in " ".join(capsys.readouterr().out.split())
