"""The documents as a site: every page is in it, every link leads somewhere, nothing comes from elsewhere."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    listed = re.findall(r"[\w/-]+\.md", navigation)
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")]
    assert sorted(listed) == sorted(pages)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("zensical") is None, reason="zensical is not installed: make docs")
def test_it_is_built_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    done = build(tmp_path)
    assert done.returncode == 0, done.stdout[-3000:]
    pages = list((tmp_path / "build" / "site").rglob("*.html"))
    assert len(pages) > 30
    loaded = re.compile(r"<(?:script|img|link)[^>]*(?:src|href)=\"?(https?:[^\"\s>]+)")
    elsewhere = {page.parent.name: loaded.findall(page.read_text()) for page in pages}
    assert {name: found for name, found in elsewhere.items() if found} == {}
    assert (tmp_path / "build" / "site" / "search.json").stat().st_size > 100_000

    with (tmp_path / "docs" / "start.md").open("a") as page:
        page.write("\n[a link to nowhere](nowhere.md)\n")
    assert build(tmp_path).returncode != 0


def build(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--strict"],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
