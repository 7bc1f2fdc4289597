"""Sizes in bytes as text: exact for configurations, rounded for people."""

from __future__ import annotations

EXACT_UNITS = {"KiB": 1024, "MiB": 1024**2, "GiB": 1024**3, "TiB": 1024**4}
EXACT_UNITS |= {"KB": 1000, "MB": 1000**2, "GB": 1000**3, "TB": 1000**4}
_GLANCE = {"B": 1, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3, "TiB": 1024**4}


def format_size(size: int) -> str:
    """Write bytes so that a configuration reads exactly the same number back: `67108864` is `64MiB`."""
    fitting = ((size // scale, name) for name, scale in EXACT_UNITS.items() if size and size % scale == 0)
    count, name = min(fitting, default=(int(size), "B"))
    return f"{count}{name}"


def rounded_size(size: int) -> str:
    """Write bytes for people to take in at a glance, no longer exact: `1503238554` is `1.4 GiB`."""
    scale, name = max((scale, name) for name, scale in _GLANCE.items() if scale <= max(abs(size), 1))
    return f"{size / scale:.1f} {name}" if scale > 1 else f"{size} {name}"
