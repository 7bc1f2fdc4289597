"""One moment for each kind of thing and model: what is due, and when the next thing is."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mlxsup.scheduling.timers import Timers


def due(timers: Timers, now: float) -> list[str]:
    found = []
    while (key := timers.take_due(now)) is not None:
        found.append(key[1])
    return found


def test_nothing_is_due_where_nothing_was_set() -> None:
    timers = Timers()
    assert timers.next_at() is None
    assert timers.take_due(1e9) is None


def test_a_thing_is_due_from_its_moment_on_and_once() -> None:
    timers = Timers()
    timers.set("expires", "a", 5.0)
    assert timers.next_at() == 5.0
    assert timers.take_due(4.9) is None
    assert timers.take_due(5.0) == ("expires", "a")
    assert timers.take_due(5.0) is None
    assert timers.next_at() is None


def test_what_comes_first_is_due_first_and_of_equals_what_was_set_first() -> None:
    timers = Timers()
    for model, at in (("late", 9.0), ("z", 5.0), ("a", 5.0), ("early", 1.0)):
        timers.set("expires", model, at)
    assert due(timers, 9.0) == ["early", "z", "a", "late"]


def test_the_moment_set_last_is_the_only_one() -> None:
    timers = Timers()
    timers.set("expires", "a", 5.0)
    timers.set("expires", "a", 9.0)
    assert timers.next_at() == 9.0
    timers.set("expires", "a", 3.0)
    timers.set("expires", "a", 7.0)
    assert due(timers, 6.9) == []
    assert due(timers, 7.0) == ["a"]
    assert timers.next_at() is None


def test_what_is_never_to_come_does_not() -> None:
    timers = Timers()
    timers.set("drain", "a", None)
    timers.set("drain", "a", 5.0)
    timers.set("drain", "a", None)
    assert timers.next_at() is None
    timers.set("drain", "a", 5.0)
    assert due(timers, 5.0) == ["a"]


def test_it_is_known_what_will_come() -> None:
    timers = Timers()
    timers.set("look", "", 5.0)
    assert timers.has("look", "")
    assert not timers.has("retry", "")
    assert not timers.has("look", "a")
    timers.take_due(5.0)
    assert not timers.has("look", "")


def test_two_kinds_of_one_model_are_two_things() -> None:
    timers = Timers()
    timers.set("drain", "a", 2.0)
    timers.set("retry", "a", 1.0)
    timers.set("drain", "a", None)
    assert timers.take_due(9.0) == ("retry", "a")
    assert timers.take_due(9.0) is None


def test_a_moment_moved_on_a_thousand_times_is_kept_twice_at_most() -> None:
    """The keep-alive of a busy model is set anew with every request."""
    timers = Timers()
    for moment in range(1000):
        timers.set("expires", "a", 60.0 + moment)
        timers.next_at()
    assert len(timers._heap) <= 2
    for moment in range(1000):
        timers.set("expires", "b", 5000.0 + moment)
    assert len(timers._heap) <= 3


@given(st.lists(st.tuples(st.sampled_from("abc"), st.none() | st.integers(0, 9), st.booleans()), max_size=40))
def test_it_does_what_a_plain_table_of_moments_would(steps: list[tuple[str, int | None, bool]]) -> None:
    timers, table = Timers(), dict[str, float]()
    for now, (model, delay, look) in enumerate(steps):
        timers.set("expires", model, None if delay is None else float(now + delay))
        table.pop(model, None)
        if delay is not None:
            table[model] = float(now + delay)
        if look:
            assert timers.next_at() == min(table.values(), default=None)
            ripe = [at for at in table.values() if at <= now]
            taken = timers.take_due(now)
            assert (taken is not None) == bool(ripe)
            if taken is not None:
                assert table.pop(taken[1]) == min(ripe)
