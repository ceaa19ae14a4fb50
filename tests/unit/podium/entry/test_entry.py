"""An entry as it is built, and each way in which a validator would refuse a spoilt one."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from podium.__main__ import main
from podium.entry import requirements
from podium.entry.objections import objections
from podium.entry.sources import missing_modules, needed_files
from podium.entry.texts import DOCKERFILES

ROOT = Path(__file__).parents[4]
LICENSE, NOTICE = "Licence of upstream\n\nterms\n", "Notice of upstream\n"
TEXT_IMAGE = DOCKERFILES[0]
GIT = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}


def git(folder: Path, *arguments: str) -> None:
    names = [part for key in ("user.name", "user.email") for part in ("-c", f"{key}=x@example.org")]
    subprocess.run(
        ["git", "-C", str(folder), *names, *arguments],
        check=True,
        capture_output=True,
        timeout=60,
        env={**os.environ, **GIT},
    )


def commit(folder: Path) -> None:
    git(folder, "add", "--all", "--force")
    git(folder, "commit", "--quiet", "--allow-empty", "--message", "x")


@pytest.fixture(scope="module")
def legal(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("upstream")
    (folder / "LICENSE.md").write_text(LICENSE)
    (folder / "NOTICE.txt").write_text(NOTICE)
    return folder / "LICENSE.md", folder / "NOTICE.txt"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, legal: tuple[Path, Path]) -> Path:
    folder = tmp_path_factory.mktemp("entry") / "repository"
    license_file, notice_file = map(str, legal)
    assert main(["entry", "build", str(folder), "--license", license_file, "--notice", notice_file]) == 0
    git(folder, "init", "--quiet")
    commit(folder)
    return folder


KEPT = (*DOCKERFILES, "LICENSE", "NOTICE", "README.md", "requirements.txt", ".gitignore")


@pytest.fixture(scope="module")
def small(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The entry with a runner that imports nothing: every rule holds for it, and a check takes no time."""
    folder = tmp_path_factory.mktemp("small") / "repository"
    for name in KEPT:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(built / name, folder / name)
    for name in ("shared/__init__.py", "trainer_node/contest/__main__.py"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("")
    git(folder, "init", "--quiet")
    commit(folder)
    return folder


@pytest.fixture
def entry(small: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small, tmp_path / "repository"))


def test_a_built_entry_has_no_objections(built: Path, legal: tuple[Path, Path]) -> None:
    assert objections(built, *legal) == []


def test_the_small_entry_has_no_objections(small: Path, legal: tuple[Path, Path]) -> None:
    assert objections(small, *legal) == []


def test_it_is_small_enough_to_clone_in_seconds(built: Path) -> None:
    sizes = [path.stat().st_size for path in built.rglob("*") if path.is_file()]
    assert sum(sizes) < 4 << 20
    assert len(sizes) < 600


def test_it_runs_with_its_own_code_only(built: Path, tmp_path: Path) -> None:
    code = (
        "import sys, trainer_node.contest.__main__ as m, trainer_node.engine.__main__\n"
        "assert m.__file__.startswith(sys.argv[1]), m.__file__\n"
        "print(sorted({'nats', 'torch', 'aiohttp'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(built)],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(built), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.stdout.strip(), done.stderr) == ("[]", "")
    assert missing_modules(built) == []


def test_it_holds_no_service_of_the_network() -> None:
    files = set(map(str, needed_files(ROOT)))
    assert "trainer_node/contest/runner.py" in files
    assert "trainer_node/engine/pipeline.py" in files
    assert not [name for name in files if name.startswith(("gateway", "podium", "shared/broker", "bench"))]


def test_every_requirement_is_pinned_torch_first(built: Path) -> None:
    lines = (built / "requirements.txt").read_text().splitlines()
    assert lines[0].startswith("torch==")
    assert all(re.fullmatch(r"[a-z0-9-]+==[^+ ]+", line) for line in lines)
    assert len(lines) == len(set(lines))
    assert "transformers" in {line.partition("==")[0] for line in lines}


def test_the_pinned_roots_are_the_projects() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    trainer = {re.split(r"[<>=!\[]", line)[0] for line in project["optional-dependencies"]["trainer"]}
    assert trainer <= set(requirements.ROOTS)


def test_an_entry_is_built_again_over_itself_and_over_nothing_else(
    entry: Path, legal: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--license", str(legal[0]), "--notice", str(legal[1]), "--profiles", "lora_r16"]
    (entry / "shared" / "old.py").write_text("")
    (entry / "notes.md").write_text("mine")
    assert main(["entry", "build", str(entry), *options]) == 0
    assert not (entry / "shared" / "old.py").exists()
    assert (entry / "notes.md").read_text() == "mine"
    assert 'PODIUM_CONTEST_PROFILES="lora_r16"' in (entry / TEXT_IMAGE).read_text()
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("")
    assert main(["entry", "build", str(other), *options]) == 2
    assert "holds something else" in capsys.readouterr().err


def test_a_legal_file_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--license", str(tmp_path / "none"), "--notice", str(tmp_path / "none")]
    assert main(["entry", "build", str(tmp_path / "entry"), *arguments]) == 2
    assert "--license" in capsys.readouterr().err
    assert not (tmp_path / "entry").exists()


def edited(name: str, old: str, new: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        for image in DOCKERFILES if name == "image" else [name]:
            text = (folder / image).read_text()
            assert old in text
            (folder / image).write_text(text.replace(old, new))

    return spoil


def added(name: str, content: bytes) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)

    return spoil


def removed(*names: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return spoil


def linked(name: str, target: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return spoil


ROWS = json.dumps([{"instruct": "x" * 100}] * 1000).encode()
SPOILT: list[tuple[str, Callable[[Path], None], str]] = [
    ("no Dockerfile", removed(*DOCKERFILES), f"there is no {TEXT_IMAGE}"),
    ("another user", edited("image", "ENTRYPOINT", "USER podium\nENTRYPOINT"), "runs as podium"),
    ("no entrypoint", edited("image", "ENTRYPOINT", "CMD"), "has no ENTRYPOINT"),
    ("an empty entrypoint", edited("image", '["python", "-m", "trainer_node.contest"]', ""), "shell form"),
    ("shell form", edited("image", '["python", "-m", "trainer_node.contest"]', "python -m x"), "shell form"),
    ("unknown profile", edited("image", "auto lora_r16", "autos"), "unknown profile 'autos'"),
    ("copies nothing", edited("image", "COPY shared shared", "COPY data data"), "copies data"),
    ("copies from outside", edited("image", "COPY shared", "COPY ../repository"), "copies ../repository"),
    ("a model in the image", edited("image", "COPY shared", "RUN hf download x/y\nCOPY shared"), "downloads"),
    ("no licence", removed("LICENSE"), "there is no LICENSE"),
    ("another licence", edited("LICENSE", "terms", "other terms"), "differs from"),
    ("no notice", removed("NOTICE"), "there is no NOTICE"),
    ("another notice", added("NOTICE", b"Mine\n"), "in line 1"),
    ("not pinned", edited("requirements.txt", "numpy==", "numpy>="), "doesn't pin numpy"),
    ("from an address", added("requirements.txt", b"x @ https://example.org/x.zip\n"), "from an address"),
    ("compiled code", added("shared/x.pyc", b"\0"), "packed or compiled"),
    ("an archive", added("more.tar.gz", b"\0"), "packed or compiled"),
    ("weights", added("base/model.safetensors", b"\0"), "holds weights"),
    ("a data set", added("rows.json", ROWS), "may hold a data set"),
    ("a large file", added("notes.md", b"x\n" * (1 << 20)), "notes.md is 2097152 bytes"),
    ("a binary", added("tool", b"\x7fELF\0"), "is not text"),
    ("minified", added("x.py", b"x = 1; " * 500), "has a line of"),
    ("hidden code", added("x.py", b"import base64\nexec(base64.b64decode('eA=='))\n"), "that it unpacks"),
    ("no Python", added("x.py", b"def"), "is not Python"),
    ("a secret", added("x.py", b"TOKEN = 'hf_" + b"a" * 34 + b"'\n"), "holds a secret"),
    (
        "a missing module",
        added("shared/x.py", b"import shared.files\n"),
        "which is not in the repository",
    ),
    ("no runner", removed("trainer_node/contest/__main__.py"), "the runner trainer_node/contest is missing"),
    ("a link outwards", linked("rows", "/etc"), "is a link out of the repository"),
    ("a link to nothing", linked("LICENSE", "terms"), "is a link to nothing"),
    ("git LFS", added(".gitattributes", b"*.x filter=lfs\n"), "uses git LFS"),
    ("submodules", added(".gitmodules", b""), "has submodules"),
]


@pytest.mark.parametrize(("spoil", "words"), [case[1:] for case in SPOILT], ids=[case[0] for case in SPOILT])
def test_a_spoilt_entry_is_refused_with_what_to_do(
    spoil: Callable[[Path], None],
    words: str,
    entry: Path,
    legal: tuple[Path, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    spoil(entry)
    commit(entry)
    arguments = ["--license", str(legal[0]), "--notice", str(legal[1])]
    assert main(["entry", "check", str(entry), *arguments]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    (found,) = {one["what"] for one in json.loads(last)["objections"] if words in one["what"]}
    assert words in found
    assert all(one["advice"] for one in json.loads(last)["objections"])


@pytest.mark.parametrize("source", [".", "./", "/", "./shared"])
def test_a_dockerfile_may_copy_the_whole_context(source: str, entry: Path, legal: tuple[Path, Path]) -> None:
    edited("image", "COPY shared shared", f"COPY {source} shared")(entry)
    commit(entry)
    assert objections(entry, *legal) == []


def test_without_git_a_check_says_so(
    entry: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    assert main(["entry", "check", str(entry)]) == 1
    assert "git can't be run" in capsys.readouterr().err


def test_a_folder_that_can_not_be_written_is_named(
    legal: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    options = ["--license", str(legal[0]), "--notice", str(legal[1])]
    assert main(["entry", "build", str(tmp_path / "file" / "entry"), *options]) == 2
    assert "can't be written" in capsys.readouterr().err


def test_what_is_not_committed_is_named(entry: Path, legal: tuple[Path, Path]) -> None:
    (entry / "notes.md").write_text("mine")
    assert [one.what for one in objections(entry, *legal)] == ["1 files are not committed"]
    shutil.rmtree(entry / ".git")
    assert [one.what for one in objections(entry, *legal)] == ["it is not a git repository"]


def test_a_check_without_upstreams_files_says_so(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["entry", "check", str(small)]) == 0
    assert "were not compared" in capsys.readouterr().out
