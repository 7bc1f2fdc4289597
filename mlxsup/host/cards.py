"""Asks about cards again and again, and waits for no driver that hangs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Iterable
from contextlib import suppress
from typing import Final

from mlxsup.host import gpu_nvidia
from mlxsup.host.device import Device
from mlxsup.host.gpu_nvidia import Card, NoAnswerError
from mlxsup.threads import begin

log = logging.getLogger(__name__)

LOOK_LIMIT: Final = 2.0
"""Seconds that a look waits for the driver."""


class Cards:
    """What cards say, or what they said last while their driver hangs, which costs one thread however long it lasts."""

    def __init__(self, devices: Iterable[Device] = ()) -> None:
        """Take what was found for the figures of a driver that hangs from the first look on."""
        self._seen: dict[str, Card | None] = {
            one.name: Card(one.total, one.free) for one in devices if one.kind == "cuda"
        }
        self._asked: asyncio.Future[dict[str, Card | None]] | None = None
        self._hangs = False

    async def look(self, names: Collection[str]) -> dict[str, Card]:
        """Return the figures of these cards, without those for which the driver does not answer; two seconds at most.

        Raises:
            NoThreadError: there are no more threads.
        """
        self._take_answer()  # it may have come too late for the look that asked
        if self._asked is None:
            self._asked = begin(_ask, names, name="mlxsup cards")
            await asyncio.wait([self._asked], timeout=LOOK_LIMIT)
            self._note(hangs=not self._asked.done())
            self._take_answer()
        return {name: card for name in names if (card := self._seen.get(name)) is not None}

    def _take_answer(self) -> None:
        if self._asked is not None and self._asked.done():
            answer, self._asked = self._asked, None
            self._seen |= answer.result()

    def _note(self, *, hangs: bool) -> None:
        if hangs and not self._hangs:
            log.warning("the driver of the cards does not answer: what it said last counts until it does")
        elif self._hangs and not hangs:
            log.info("the driver of the cards answers again")
        self._hangs = hangs


def _ask(names: Iterable[str]) -> dict[str, Card | None]:
    seen: dict[str, Card | None] = dict.fromkeys(names)
    for name in seen:
        with suppress(NoAnswerError):
            seen[name] = gpu_nvidia.look(name)
    return seen
