"""Sizes as people read them."""

from __future__ import annotations


def human_size(count: int) -> str:
    """Write bytes as `44 KiB`, `71.3 MiB` or `3.0 GiB`."""
    if count < 1 << 20:
        return f"{count / (1 << 10):.0f} KiB"
    return f"{count / (1 << 20):.1f} MiB" if count < 1 << 30 else f"{count / (1 << 30):.1f} GiB"
