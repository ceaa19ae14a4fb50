"""The dashboard's files: small, complete, and free of what its Content-Security-Policy forbids."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gateway.dashboard import pages
from gateway.dashboard.pages import PREFIX, STATIC, load_files, plot_files

MOST_BYTES = 300_000  # of the whole page, before compression


def test_the_page_is_small_with_and_without_compression() -> None:
    files = load_files()
    assert sum(len(file.body) for file in files.values()) < MOST_BYTES
    assert sum(len(file.compressed) for file in files.values()) < MOST_BYTES / 4
    assert all(len(file.tag) > 10 for file in files.values())


def test_every_file_that_is_asked_for_is_there() -> None:
    files = load_files()
    asked = set(re.findall(rf'"{PREFIX}([\w.]+)"', files["index.html"].body.decode()))
    for name, file in files.items():
        if name.endswith(".js"):
            asked |= set(re.findall(r'from "\./([\w.]+)"', file.body.decode()))
    assert asked - {"index.html"} == set(files) - {"index.html"}


@pytest.mark.parametrize("path", sorted(STATIC.iterdir()), ids=lambda path: path.name)
def test_nothing_is_inline_or_from_another_host(path: Path) -> None:
    text = path.read_text()
    assert text.isascii()
    hosts = set(re.findall(r"https?://[\w.]+", text)) - {"http://www.w3.org"}  # a name, not an address
    assert not hosts
    if path.suffix == ".html":
        assert not re.search(r"\son\w+=|\sstyle=|<style|<script(?![^>]*\ssrc=)", text)
    assert "innerHTML" not in text, "what a task is called must stay text"


def test_without_uplot_the_page_is_served_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(plot_files()["uplot.js"]) > 10_000, "make setup installs uplot-python"
    monkeypatch.setattr(pages, "find_spec", lambda name: None)
    found = load_files()
    assert b"not installed" in found["uplot.js"].body
    assert found["uplot.css"].body == b""
