"""Why things are as they are, in words: for the log, for errors, for status."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mlxsup.errors import Backoff
from mlxsup.scheduling.admission import Plan
from mlxsup.scheduling.book import Book
from mlxsup.scheduling.ledger import SLOTS, Account, Holding, Ledger
from mlxsup.sizes import rounded_size

MOST_NAMED = 5
"""Of so many models the names are told."""


def stuck(model: str, pids: Sequence[int]) -> Backoff:
    """Say that a process does not go."""
    reason = f"SIGKILL was sent to {', '.join(map(str, pids))}, and it is still there"
    return Backoff(
        f"{model} cannot be started again yet: {reason}",
        retry_after=5.0,
        details={"model": model, "pids": list(pids), "reason": reason},
    )


def broken(book: Book, now: float) -> Backoff:
    """Say that a model fails again and again, with the cause of the last time."""
    wait = max(0.1, book.breaker.retry_at - now)
    cause = book.error
    assert cause is not None  # a breaker opens by failures
    return Backoff(
        f"{book.name} failed {book.breaker.streak} times in a row and is not started again yet: {cause.message}",
        retry_after=round(wait, 1),
        details={**cause.details, "model": book.name, "cause_code": cause.code, "failures": book.breaker.streak},
    )


def waits_to_retry(book: Book, now: float) -> str:
    """Say when a failed model is tried again."""
    why = f" after: {book.error.message}" if book.error is not None else ""
    return f"started again in {book.breaker.retry_at - now:.1f} s{why}"


def room(book: Book, shares: Mapping[str, int], ledger: Ledger) -> str:
    """Say what a model needs and what there is of it."""
    parts = []
    for name, need in shares.items():
        account = ledger.accounts[name]
        if name == SLOTS:
            parts.append(f"{account.counted} of {account.device.total} places are taken (max_loaded)")
        else:
            parts.append(
                f"{book.name} needs {rounded_size(need)} on {name}, {rounded_size(max(0, account.available))} are free"
            )
    return " and ".join(parts)


def evicted(book: Book, plan: Plan, ledger: Ledger, sums: str) -> str:
    """Say why somebody goes for a model."""
    return f"put out for {book.name}: {room(book, plan.shares, ledger)}; {sums}"


def pressure(account: Account, sums: str) -> str:
    """Say why somebody goes for nobody in particular."""
    return f"put out because {_shortage(account)}; {sums}"


def low(account: Account) -> str:
    """Say that a device is overdrawn and nobody is idle."""
    where = "" if account.device.name == SLOTS else " there"
    return f"{_shortage(account)}, and no idle model can be put out: nothing more is loaded{where}"


def _shortage(account: Account) -> str:
    if account.device.name == SLOTS:
        return f"{account.counted - account.departing} are loaded and max_loaded is {account.device.total}"
    return f"{account.device.name} lacks {rounded_size(account.shortage)}"


def outgrown(holding: Holding) -> str:
    """Say that a runner uses more than it was thought to."""
    parts = [
        f"{rounded_size(holding.measured[name])} of {name} where {rounded_size(reserved)} were reserved"
        for name, reserved in holding.reserved.items()
        if holding.measured.get(name, 0) > reserved
    ]
    return f"uses {' and '.join(parts)}"


def joins(book: Book, now: float) -> str:
    """Say for what a new request waits where nothing has to be done for it."""
    behind = len(book.waiting) - 1
    if book.state == "ready":
        return f"queued: all {book.policy.concurrency} of its places are taken, {behind} wait before it"
    if book.state == "starting":
        return "queued: it is being loaded" + (f", {behind} wait before it" if behind else "")
    if book.state == "backoff":
        return f"queued: {waits_to_retry(book, now)}"
    return f"queued, and loaded again: it is on its way out ({book.reason})"


def after(victims: Mapping[str, str], why: str) -> str:
    """Say that these are put out for a request, each with the sums that speak for it."""
    going = "; ".join(f"{name} ({sums})" for name, sums in victims.items())
    return f"loaded after these are put out: {going}; {why}"


def makes_do(wait: float, then: str, need: int, why: str) -> str:
    """Say that a request waits a while for other programs to give memory back, and then makes do with less."""
    return f"queued: if no memory is given back in {wait:.1f} s, {rounded_size(need)} must do; then {then} ({why})"


def when_gone(names: Sequence[str], rivals: Sequence[str], why: str) -> str:
    """Say that a request needs what those have who go already, or the memory of who is gone; `rivals` will be loaded again."""
    what = f"when those who go are gone ({_named(names)})" if names else "when the memory of who went is back"
    return f"loaded {what}: {why}" + (f"; to be loaded again: {_named(rivals)}" if rivals else "")


def behind(names: Sequence[str], why: str) -> str:
    """Say that there would be room for a request, but for others that wait."""
    return f"queued behind {_named(names)}, to whom memory goes first: {why}"


def when_old_enough(names: Sequence[str], wait: float, residency: float, why: str) -> str:
    """Say who will be put out for a request as soon as it has been there for long enough."""
    return (
        f"queued: in {wait:.1f} s {_named(names)} will have been loaded for {residency:g} s and may be put out; {why}"
    )


def blocked(who: Mapping[str, str], why: str) -> str:
    """Say that a request waits for something to happen that nobody can bring about."""
    standing = _named([f"{name} {what}" for name, what in who.items()])
    return f"queued until there is room: {why}" + (f"; {standing}" if standing else "")


def cannot_go(book: Book) -> str:
    """Say why a model that is loaded is not put out now, in words that follow its name."""
    if book.policy.pinned:
        return "is pinned"
    if book.state == "ready":
        return "is in use" if book.leases else "is idle"
    words = {"starting": "is being loaded", "draining": "ends its work", "stopping": "goes"}
    return words.get(book.state, "does not go")


def _named(names: Sequence[str]) -> str:
    """Join names, the first of them where they are many."""
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more
