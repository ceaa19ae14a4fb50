"""The part of a documentation page that a bench makes, between two comments."""

from __future__ import annotations

from collections.abc import Sequence


def with_part(page: str, begin: str, end: str, lines: Sequence[str]) -> str:
    """Return the page with other lines between two marks. Raises ValueError if it lacks one of them."""
    before, _, rest = page.partition(begin)
    _, mark, after = rest.partition(end)
    if not mark:
        raise ValueError(f"the page lacks {begin} or {end}")
    return "\n".join([before + begin, "", *lines, "", end + after])
