"""Who has how much of each device: reserved at admission, replaced by what was measured where that is more.

Bytes everywhere. What a device has left is told twice, by what was given out (the ledger's own sum) and by what the operating
system says is free; the smaller counts. Nothing here decides anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import msgspec

from mlxsup.errors import DoesNotFit
from mlxsup.sizes import format_size, rounded_size

Shares = Mapping[str, int]
"""Bytes by the name of the device."""

SLOTS = "places"
"""The name of the account in which each model is one byte, so that `max_loaded` is kept like any memory."""

GROWTH = 1.1
"""A runner that was seen to outgrow its reservation is spoken of again when it has grown by so much more."""
UNNOTICED = 32 << 20
"""Growth past a reservation that is not worth a word."""


class Device(msgspec.Struct, frozen=True, kw_only=True):
    """A place for models: what it has, what is never given out of it (`minimum` of its kind, `overhead` as configured)."""

    name: str
    total: int
    minimum: int = 0
    overhead: int = 0


class Account:
    """One device's sums. `free` is what the operating system says, None where nobody asks it."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.kept = device.minimum + device.overhead
        self.free: int | None = None
        self.counted = 0
        """Of all models: what is reserved or measured, whichever is more."""
        self.unfulfilled = 0
        """Reserved and not yet seen in use: the system calls it free still."""
        self.departing = 0
        """The part of `counted` that belongs to models on their way out."""
        self.pinned = 0
        """The part of `counted` that never goes."""
        self.pledged = 0
        """The part of `pinned` that was reserved, which is no passing growth."""
        self.expected = 0
        """What models that are gone have given back and the system has not shown yet."""
        self.expected_until = float("-inf")
        self.low = False
        """Whether it was said that the device runs low."""

    @property
    def available(self) -> int:
        """Return what can be given out now."""
        return self._left(0, 0)

    @property
    def soon(self) -> int:
        """Return what can be given out once those who go are gone."""
        return self._left(self.departing, self.expected)

    @property
    def reach(self) -> int:
        """Return what could be given out if all that may go were gone."""
        return self._left(self.counted - self.pinned, self.expected)

    @property
    def utmost(self) -> int:
        """Return what could be given out if, besides, no other program took any and pinned models what they reserved."""
        return self.device.total - self.kept - self.pledged

    def _left(self, returned: int, expected: int) -> int:
        left = self.device.total - self.kept - self.counted + returned
        if self.free is not None:
            left = min(left, self.free - self.kept - self.unfulfilled + returned + expected)
        return left

    @property
    def shortage(self) -> int:
        """Return by how much it is overdrawn, those who go left out; 0 when all is well."""
        return max(0, -self.soon)


class Holding:
    """What one model has."""

    def __init__(self, reserved: Shares, *, pinned: bool) -> None:
        self.reserved = dict(reserved)
        self.measured: dict[str, int] = {}
        self.pinned = pinned
        self.departing = False
        self.spoken_of = 0

    def counted(self, device: str) -> int:
        """Return what counts on a device: the larger of the two."""
        return max(self.reserved.get(device, 0), self.measured.get(device, 0))

    def devices(self) -> Iterable[str]:
        """Return where it has anything."""
        return self.reserved.keys() | self.measured.keys() if self.measured else self.reserved.keys()


class Ledger:
    """All accounts and holdings."""

    def __init__(self, devices: Iterable[Device], max_loaded: int = 0) -> None:
        self.accounts = {device.name: Account(device) for device in devices}
        if max_loaded:
            self.accounts[SLOTS] = Account(Device(name=SLOTS, total=max_loaded))
        self.holdings: dict[str, Holding] = {}

    def reserve(self, model: str, shares: Shares, *, pinned: bool) -> None:
        """Give a model what it will need."""
        self.holdings[model] = Holding(shares, pinned=pinned)
        self._book(self.holdings[model], 1)

    def release(self, model: str, until: float) -> None:
        """Take back all that a model has; by `until` the system should show what was in use of it."""
        holding = self.holdings.pop(model, None)
        if holding is None:
            return
        self._book(holding, -1)
        for name, measured in holding.measured.items():
            account = self.accounts.get(name)
            if account is not None and account.free is not None and measured:
                account.expected += measured
                account.expected_until = until

    def depart(self, model: str, *, departing: bool) -> None:
        """Note whether a model is on its way out."""
        holding = self.holdings.get(model)
        if holding is not None and holding.departing != departing:
            self._book(holding, -1)
            holding.departing = departing
            self._book(holding, 1)

    def pin(self, model: str, *, pinned: bool) -> None:
        """Note whether a model may be put out for others."""
        holding = self.holdings.get(model)
        if holding is not None and holding.pinned != pinned:
            self._book(holding, -1)
            holding.pinned = pinned
            self._book(holding, 1)

    def measure(self, model: str, used: Shares) -> bool:
        """Take note of what a model uses; returns whether it is worth saying that it has outgrown its reservation."""
        holding = self.holdings.get(model)
        if holding is None or holding.measured == used:
            return False
        self._book(holding, -1)
        holding.measured = dict(used)
        self._book(holding, 1)
        grown = sum(max(0, used.get(name, 0) - reserved) for name, reserved in holding.reserved.items())
        if not any(holding.reserved.get(name) for name in used) or grown <= max(UNNOTICED, GROWTH * holding.spoken_of):
            return False
        holding.spoken_of = grown
        return True

    def see(self, free: Shares) -> None:
        """Take note of what the system says is free."""
        for name, size in free.items():
            account = self.accounts.get(name)
            if account is None:
                continue
            if account.free is not None:
                account.expected = max(0, account.expected - max(0, size - account.free))
            account.free = size

    def settle(self, now: float) -> bool:
        """Expect no more what did not come back in time; returns whether anything is still expected."""
        waiting = False
        for account in self.accounts.values():
            if account.expected and account.expected_until <= now:
                account.expected = 0
            waiting = waiting or bool(account.expected)
        return waiting

    def counted(self, model: str) -> dict[str, int]:
        """Return what counts for a model, by device."""
        holding = self.holdings.get(model)
        return {} if holding is None else {name: holding.counted(name) for name in holding.devices()}

    @property
    def capacity(self) -> int:
        """Return the bytes that there are for models, on all devices together."""
        accounts = (account for name, account in self.accounts.items() if name != SLOTS)
        return sum(max(0, account.device.total - account.kept) for account in accounts)

    def known(self, shares: Shares) -> dict[str, int]:
        """Return the shares with the place that each model takes where these are counted."""
        return {**shares, SLOTS: 1} if SLOTS in self.accounts else dict(shares)

    def refit(self, devices: Iterable[Device], max_loaded: int) -> None:
        """Take over other figures for the devices, as after a change of the configuration."""
        old = self.accounts
        fresh = Ledger(devices, max_loaded)
        for name, account in fresh.accounts.items():
            if name in old:
                account.free, account.expected = old[name].free, old[name].expected
                account.expected_until, account.low = old[name].expected_until, old[name].low
        self.accounts = fresh.accounts
        for holding in self.holdings.values():
            holding.reserved.pop(SLOTS, None)
            if max_loaded:
                holding.reserved[SLOTS] = 1
            self._book(holding, 1)

    def _book(self, holding: Holding, sign: int) -> None:
        for name, account in self._accounts_of(holding):
            counted = sign * holding.counted(name)
            account.counted += counted
            account.unfulfilled += sign * max(0, holding.reserved.get(name, 0) - holding.measured.get(name, 0))
            if holding.departing:
                account.departing += counted
            if holding.pinned and not holding.departing:
                account.pinned += counted
                account.pledged += sign * holding.reserved.get(name, 0)

    def _accounts_of(self, holding: Holding) -> Iterator[tuple[str, Account]]:
        for name in holding.devices():
            if name in self.accounts:
                yield name, self.accounts[name]


def refusal(account: Account, need: int, available: int, *, retry_after: float | None, why: str = "") -> DoesNotFit:
    """Say that a need does not fit, with the figures.

    Args:
        account: of the device that is too small.
        need: bytes.
        available: bytes that could be had at most.
        retry_after: seconds after which it may; None: it never will.
        why: what stands in the way, and where the need comes from.
    """
    if account.device.name == SLOTS:
        text = f"max_loaded is {account.device.total}, and all that are loaded are pinned"
        return DoesNotFit(text, retry_after=retry_after, details={"max_loaded": account.device.total})
    available = max(0, available)
    shown, there = rounded_size(need), rounded_size(available)
    if shown == there:  # `requires 4.0 GiB but only 4.0 GiB` would help nobody
        shown, there = format_size(need), format_size(available)
    kept = rounded_size(account.kept)
    text = f"model requires {shown} but only {there} are available (after {kept} overhead){why and '; ' + why}"
    details: dict[str, object] = {
        "device": account.device.name,
        "required": need,
        "available": available,
        "overhead": account.kept,
    }
    if retry_after is None:
        details["permanent"] = True
    return DoesNotFit(text, retry_after=retry_after, details=details)
