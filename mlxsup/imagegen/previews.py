"""At which steps a picture of the work in progress is made, and how large it is."""

from __future__ import annotations

from mlxsup.imagegen.pipelines.base import PREVIEW_SIDE


def preview_steps(wanted: int, first: int, total: int) -> frozenset[int]:
    """Spread previews evenly between the first step and the last, of which neither is one.

    Args:
        wanted: how many; there are fewer where there are fewer steps.
        first: steps done when the work begins.
        total: steps done when it ends.
    """
    count = max(0, min(wanted, total - first - 1))
    return frozenset(first + round(at * (total - first) / (count + 1)) for at in range(1, count + 1))


def preview_size(width: int, height: int) -> tuple[int, int]:
    """Return width and height of a preview of a picture of this size."""
    scale = min(1.0, PREVIEW_SIDE / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))
