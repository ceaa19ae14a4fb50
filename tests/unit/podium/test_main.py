from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from podium.__main__ import COMMANDS, main, parser
from shared.net import free_port
from shared.version import version


def test_every_command_is_there() -> None:
    for command in COMMANDS:
        with pytest.raises(SystemExit) as ended:
            parser().parse_args([command.removesuffix("_table"), "--help"])
        assert ended.value.code == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["status"], "no gateway at http://127.0.0.1"),
        (["watch", "x"], "is `podium up` running?"),
        (["offer", "none.json"], "none.json can't be read"),
    ],
)
def test_what_a_user_got_wrong_is_one_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--url", f"http://127.0.0.1:{free_port()}"]) == 1
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1


def test_a_wrong_setting_is_exit_code_two(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PODIUM_SLOTT", "a")
    assert main(["status"]) == 2
    assert "unknown setting PODIUM_SLOTT" in capsys.readouterr().err


def test_settings_lists_them_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["settings"]) == 0
    assert "PODIUM_NATS_URL" in capsys.readouterr().out


def test_the_page_of_settings_is_what_the_code_has(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After a change: `podium settings --markdown` prints the table of docs/settings.md."""
    monkeypatch.setenv("PODIUM_LOG_LEVEL", "debug")  # what is set here doesn't show
    assert main(["settings", "--markdown"]) == 0
    page = (Path(__file__).parents[3] / "docs" / "settings.md").read_text()
    assert page.endswith(capsys.readouterr().out)


def test_a_closed_pipe_is_no_error(tmp_path: Path) -> None:
    done = subprocess.run(
        f"{sys.executable} -m podium settings | head -1",
        shell=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stderr == ""


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"podium {version()}\n"


def test_log_lines_do_not_mix_with_the_answer() -> None:
    """`--json` is read by programs: what is logged on the way goes to standard error."""
    script = (
        "import sys\n"
        "from podium import __main__ as command_line\n"
        "from podium.commands import settings\n"
        "from shared.logs import get_logger\n"
        "settings.run = lambda args: get_logger().info('on the way') or print('{}') or 0\n"
        "sys.argv = ['podium', 'settings']\n"
        "sys.exit(command_line.main())\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout == "{}\n"
    assert "on the way" in done.stderr
