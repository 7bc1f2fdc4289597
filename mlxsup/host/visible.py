"""Which cards CUDA_VISIBLE_DEVICES leaves to a process, read as CUDA does (pure).

It is a list of numbers and of UUIDs, "GPU-..." or as many of their first characters as tell one card from the others. The first
entry that names no card ends the list, so that "" and "-1" leave none. Numbers are in the order of the bus here, as NVML's are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Final

import msgspec

VARIABLE: Final = "CUDA_VISIBLE_DEVICES"
ORDER: Final = "CUDA_DEVICE_ORDER"
BY_BUS: Final = "PCI_BUS_ID"

_NUMBER = re.compile(r"[0-9]{1,6}")


class Chosen(msgspec.Struct, frozen=True):
    """The cards that are left, by number, in their order; `counted`: whether any was named by its number."""

    indices: tuple[int, ...] = ()
    counted: bool = False


def chosen(value: str, count: int, uuids: Callable[[], Sequence[str]]) -> Chosen:
    """Read the variable.

    Args:
        value: of it.
        count: of all cards.
        uuids: tells those of all cards, "" where one is not known; asked only if the variable has any.
    """
    known = [uuid.lower() for uuid in uuids()] if "GPU-" in value else []
    indices: list[int] = []
    counted = False
    for entry in (each.strip() for each in value.split(",")):
        if _NUMBER.fullmatch(entry) and int(entry) < count:
            indices.append(int(entry))
            counted = True
            continue
        named = [index for index, uuid in enumerate(known) if uuid.startswith(entry.lower())]
        if not entry.startswith("GPU-") or len(named) != 1:
            break
        indices += named
    return Chosen(tuple(dict.fromkeys(indices)), counted)
