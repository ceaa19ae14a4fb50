"""Where the rows of a job come from: a file on this machine, an https server or the hub."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from shared.messages.offers import FileFormat
from trainer_node.engine.data.download import fetch, is_url, public_name
from trainer_node.engine.data.formats.readers import DataFile, read
from trainer_node.engine.data.hf_datasets import download
from trainer_node.engine.data.row_set import AskedColumns, RowSet
from trainer_node.engine.data.splits import format_of


def read_rows(
    source: str,
    file_format: FileFormat,
    *,
    allow_private_urls: bool,
    asked: AskedColumns | None = None,
    keep: Path | None = None,
    tick: Callable[[str], None] = lambda text: None,
) -> RowSet:
    """Read all rows of a local file, an https URL or a hub data set: `located`, then `read`."""
    with tempfile.TemporaryDirectory(prefix="podium-data-") as folder:
        place = keep or Path(folder) / "data"
        return read(
            located(source, file_format, place, allow_private_urls=allow_private_urls, tick=tick), asked
        )


def located(
    source: str,
    file_format: FileFormat,
    keep: Path,
    *,
    allow_private_urls: bool,
    tick: Callable[[str], None] = lambda text: None,
) -> list[DataFile]:
    """Return the files of a data reference, downloaded if need be; `tick` is called as bytes come.

    `keep` is where a download stays, and where it is looked for first: a run that resumes needs the same
    rows, also when their host is down or the URL's signature has expired.
    Raises DataError if they can't be had.
    """
    name = public_name(source)
    if file_format is FileFormat.HF:
        paths = download(source, keep, allow_private=allow_private_urls, tick=tick)
        return [
            DataFile(path, format_of(path.name) or FileFormat.JSON, f"{name}/{path.name}") for path in paths
        ]
    if not is_url(source):
        return [DataFile(Path(source).expanduser(), file_format, name)]
    if not keep.exists():
        part = keep.with_name(f"{keep.name}.part")
        fetch(source, part, allow_private=allow_private_urls, tick=tick)
        part.replace(keep)
    return [DataFile(keep, file_format, name)]
