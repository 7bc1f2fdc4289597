"""Why things are as they are, in words: for the log, for errors, for status."""

from __future__ import annotations

from collections.abc import Sequence

from mlxsup.errors import Backoff
from mlxsup.scheduling.admission import Plan
from mlxsup.scheduling.book import Book
from mlxsup.scheduling.ledger import SLOTS, Account, Holding, Ledger
from mlxsup.sizes import rounded_size


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


def room(book: Book, plan: Plan, ledger: Ledger) -> str:
    """Say what a model needs and what there is of it."""
    parts = []
    for name, need in plan.shares.items():
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
    return f"put out for {book.name}: {room(book, plan, ledger)}; {sums}"


def pressure(account: Account, sums: str) -> str:
    """Say why somebody goes for nobody in particular."""
    return f"put out because {account.device.name} lacks {rounded_size(account.shortage)}; {sums}"


def low(account: Account) -> str:
    """Say that a device is overdrawn and nobody is idle."""
    return (
        f"{account.device.name} lacks {rounded_size(account.shortage)}, and no idle model can be put out:"
        " nothing more is loaded there"
    )


def outgrown(holding: Holding) -> str:
    """Say that a runner uses more than it was thought to."""
    parts = [
        f"{rounded_size(holding.measured[name])} of {name} where {rounded_size(reserved)} were reserved"
        for name, reserved in holding.reserved.items()
        if holding.measured.get(name, 0) > reserved
    ]
    return f"uses {' and '.join(parts)}"


def standing(book: Book, now: float, *, closing: bool) -> str:
    """Say what would become of a request for a model that is loaded or cannot be asked for."""
    if closing:
        return "refused: mlxsup is shutting down"
    if book.state == "ready":
        busy = len(book.leases) >= book.policy.concurrency or bool(book.waiting)
        who = f"all {book.policy.concurrency} of its places are taken, {len(book.waiting)} wait before it"
        return f"queued: {who}" if busy else "granted at once: it is ready"
    if book.state == "starting":
        return "queued: it is being loaded"
    if book.state in ("draining", "stopping"):
        return f"queued, and loaded again: it is on its way out ({book.reason})"
    if book.error is not None and book.breaker.retry_at > now and not book.breaker.open:
        return f"queued: {waits_to_retry(book, now)}"
    return f"refused: {book.error.message}" if book.error is not None else "refused"


def prospect(book: Book, plan: Plan, ledger: Ledger, sums: Sequence[str]) -> str:
    """Say what would become of a request for a model that is not loaded."""
    if plan.verdict == "refused" and plan.error is not None:
        return f"refused: {plan.error.message}"
    why = room(book, plan, ledger)
    if plan.verdict == "fits":
        return f"loaded at once: {why}" if why else "loaded at once"
    if plan.verdict == "waits":
        return f"loaded when those who go are gone: {why}"
    if plan.verdict == "evicts":
        going = "; ".join(f"{name} ({each})" for name, each in zip(plan.victims, sums, strict=True))
        return f"loaded after these are put out: {going}; {why}"
    return f"queued until a model becomes idle: {why}"
