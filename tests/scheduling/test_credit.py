"""What an idle model is worth: what raises it, how uses fade, which half-life decides, and the sums in words."""

from __future__ import annotations

import itertools

import pytest

from mlxsup.scheduling.credit import FADING, Credit, Shadow
from mlxsup.scheduling.eviction import Idle, Worth

from .driving import GIB

NOW = 0.0


def worth(seconds: float = 2.0, gib: float = 1.0, weight: float = 1.0, keep_alive: float = 0.0) -> Worth:
    return Worth(seconds=seconds, size=int(gib * GIB), weight=weight, keep_alive=keep_alive)


def used(*models: str, capacity: int = 1 << 50) -> Credit:
    """An order that has seen these uses, all of models that are alike."""
    credit = Credit()
    credit.resize(capacity)
    for model in models:
        credit.used(model, worth(), NOW)
    return credit


class TestCredit:
    @pytest.mark.parametrize(
        ("more", "times"),
        [
            (worth(seconds=4), 2),
            (worth(gib=0.5), 2),
            (worth(weight=4), 4),
            (worth(keep_alive=1800), 1.25),
            (worth(keep_alive=3600), 1.5),
            (worth(keep_alive=7200), 1.5),
            (worth(keep_alive=-1), 1.5),
        ],
    )
    def test_it_grows_with(self, more: Worth, times: float) -> None:
        credit = used()
        assert 2 ** (credit.key("a", more, NOW) - credit.key("a", worth(), NOW)) == pytest.approx(times)

    def test_what_was_never_used_is_worth_its_reload_for_each_gib(self) -> None:
        assert used("other").key("a", worth(seconds=8, gib=2), NOW) == 2.0

    @pytest.mark.parametrize("strange", [worth(seconds=0), worth(gib=0)])
    def test_no_seconds_and_no_bytes_are_no_error(self, strange: Worth) -> None:
        credit = used()
        credit.used("a", strange, NOW)
        expected = 1e-3 if strange.size else 2.0 * GIB
        assert 2 ** credit.key("b", strange, NOW) == pytest.approx(expected)

    def test_who_is_used_more_is_worth_more(self) -> None:
        credit = used("a", "b", "a")
        assert credit.key("a", worth(), NOW) > credit.key("b", worth(), NOW) > credit.key("c", worth(), NOW)

    def test_a_use_counts_half_after_sixty_four(self) -> None:
        credit = used("a", *["b"] * 63, "c")
        assert credit.key("c", worth(), NOW) - credit.key("a", worth(), NOW) == pytest.approx(1.0)

    def test_two_uses_in_a_row_are_two(self) -> None:
        credit = used("a", "a", "b")
        difference = credit.key("a", worth(), NOW) - credit.key("b", worth(), NOW)
        assert 2**difference == pytest.approx(2 ** (-1 / 64) + 2 ** (-2 / 64))

    def test_who_is_forgotten_begins_anew(self) -> None:
        credit = used("a", "a", "b")
        credit.forget("a")
        credit.forget("nobody")
        assert credit.key("a", worth(), NOW) == used().key("a", worth(), NOW)
        assert credit.key("b", worth(), NOW) == used("a", "a", "b").key("b", worth(), NOW)

    def test_the_sums_in_words(self) -> None:
        credit = used("a")
        words = "credit 2 = reload 2 s x 1 uses x 1 / 1 GiB (a use counts half after 64)"
        assert credit.explain("a", worth()) == words
        credit = used("a", *["b"] * 64)
        words = "credit 15 = reload 3 s x 0.5 uses x 5 / 0.5 GiB (a use counts half after 64)"
        assert credit.explain("a", worth(seconds=3, gib=0.5, weight=4, keep_alive=1800)) == words

    def test_the_credit_in_words_is_that_of_the_order(self) -> None:
        credit = used("a", "b", "a")
        ratio = 2 ** (credit.key("a", worth(), NOW) - credit.key("b", worth(), NOW))
        a, b = (float(credit.explain(model, worth()).split()[1]) for model in "ab")
        assert a / b == pytest.approx(ratio, rel=1e-2)

    def test_the_words_for_a_model_that_holds_nothing(self) -> None:
        words = used("a").explain("a", worth(gib=0))
        assert words.startswith("credit 2.15e+09 = reload 2 s x 1 uses x 1 / 9.31e-10 GiB")


class TestWhoLeads:
    """Three models, room for two: the one that was hot and is not any more is in the way of the others."""

    def test_the_half_life_that_would_have_cost_least_decides(self) -> None:
        credit = used(*["a"] * 200, capacity=2 * GIB)
        assert credit.epoch(NOW) == 0
        assert "after 64" in credit.explain("a", worth())
        for model in itertools.islice(itertools.cycle("bc"), 60):
            credit.used(model, worth(), NOW)
        assert credit.epoch(NOW) == 1
        assert "after 8)" in credit.explain("a", worth())

    def test_a_lead_of_less_than_a_fiftieth_is_none(self) -> None:
        credit = used("a")
        for shadow, loss in zip(credit._shadows, (100.0, 101.9, 102.0, 102.0), strict=True):
            shadow.loss = loss
        credit.used("a", worth(), NOW)
        assert credit.epoch(NOW) == 0
        credit._shadows[1].loss = 110.0
        credit.used("a", worth(), NOW)
        assert credit.epoch(NOW) == 1
        assert "after 8)" in credit.explain("a", worth())

    def test_each_change_of_the_lead_is_another_epoch(self) -> None:
        credit = used("a")
        for best in (0, 2, 3, 1):
            for shadow in credit._shadows:
                shadow.loss = 50.0 if shadow is credit._shadows[best] else 100.0
            credit.used("a", worth(), NOW)
        assert credit.epoch(NOW) == 4

    def test_with_room_for_all_nobody_takes_the_lead(self) -> None:
        assert used(*["a"] * 200, *["b", "c"] * 30).epoch(NOW) == 0

    def test_the_room_is_what_there_is(self) -> None:
        for capacity, loss in ((GIB, 8.0), (2 * GIB, 4.0)):
            losses = [shadow.loss for shadow in used(*"abab", capacity=capacity)._shadows]
            assert losses == pytest.approx([loss] * 4, rel=0.01)

    def test_keys_are_made_anew_each_minute_as_what_is_left_of_keep_alives_shrinks(self) -> None:
        credit = used()
        assert [credit.epoch(now) for now in (0.0, 59.9, 60.0, 119.9, 120.0)] == [0, 0, 1, 1, 2]


class TestShadow:
    """A cache that might have been: a use of what it does not hold costs a reload."""

    def misses(self, shadow: Shadow, models: str, *, gib: float = 1, room: float = 2, value: float = 0.0) -> list[bool]:
        """Use models one after the other; tells of each whether it had to be loaded."""
        found = []
        for model in models:
            before = shadow.loss * FADING
            self.uses = getattr(self, "uses", 0) + 1
            shadow.use(model, self.uses, worth(gib=gib), value, int(room * GIB))
            found.append(shadow.loss - before > 1)
        return found

    def test_what_is_kept_costs_nothing(self) -> None:
        assert self.misses(Shadow(8), "abab") == [True, True, False, False]

    def test_a_loss_is_the_time_of_a_reload_and_fades(self) -> None:
        shadow = Shadow(8)
        shadow.use("a", 1, worth(seconds=7), 0.0, GIB)
        assert shadow.loss == 7
        shadow.use("a", 2, worth(seconds=7), 0.0, GIB)
        assert shadow.loss == 7 * FADING

    def test_the_least_worthy_goes_and_no_more_than_must(self) -> None:
        shadow = Shadow(8)
        self.misses(shadow, "aabbc")
        assert self.misses(shadow, "b") == [False]
        assert self.misses(shadow, "c") == [False]
        assert self.misses(shadow, "a") == [True]

    def test_exactly_full_is_not_too_full(self) -> None:
        shadow = Shadow(8)
        self.misses(shadow, "abcd", room=3)
        assert self.misses(shadow, "bcd", room=3) == [False] * 3

    def test_what_is_worth_more_now_than_when_it_came_stays(self) -> None:
        shadow = Shadow(8)
        self.misses(shadow, "abaaaac")
        assert self.misses(shadow, "a") == [False]
        assert self.misses(shadow, "b") == [True]

    def test_one_that_came_just_now_stays_this_time_and_can_go_the_next(self) -> None:
        shadow = Shadow(8)
        self.misses(shadow, "aaaabbbb")
        assert self.misses(shadow, "x", value=-9.0) == [True]
        assert sorted(shadow._kept) == ["b", "x"]
        self.misses(shadow, "y", value=-9.0)
        assert sorted(shadow._kept) == ["b", "y"]

    def test_one_larger_than_all_there_is_drives_out_everybody_else(self) -> None:
        shadow = Shadow(8)
        self.misses(shadow, "ab")
        self.misses(shadow, "x", gib=5)
        assert sorted(shadow._kept) == ["x"]
        self.misses(shadow, "a")
        assert sorted(shadow._kept) == ["a"]

    def test_a_model_that_has_grown_is_counted_as_it_is_now(self) -> None:
        shadow = Shadow(8)
        self.misses(shadow, "ab", room=3)
        self.misses(shadow, "b", gib=2, room=3)
        assert sorted(shadow._kept) == ["a", "b"]
        self.misses(shadow, "b", gib=1, room=3)
        self.misses(shadow, "c", room=3)
        assert sorted(shadow._kept) == ["a", "b", "c"]

    def test_who_is_forgotten_leaves_its_room(self) -> None:
        shadow = Shadow(8)
        self.misses(shadow, "aaaab", room=3)
        shadow.forget("a")
        shadow.forget("nobody")
        assert self.misses(shadow, "cd", room=3) == [True, True]
        assert self.misses(shadow, "bcd", room=3) == [False] * 3
        assert self.misses(shadow, "a", room=3) == [True]
        assert len(shadow._kept) == 3

    def test_who_is_forgotten_is_in_nobodys_way(self) -> None:
        shadow = Shadow(8)
        self.misses(shadow, "abbcc", room=3)
        shadow.forget("a")
        self.misses(shadow, "dde", room=3)
        assert sorted(shadow._kept) == ["c", "d", "e"]


class TestIdle:
    """The order in which idle models go."""

    def test_the_lowest_key_first_and_of_equals_who_came_first(self) -> None:
        idle = Idle()
        for model, key in (("dear", 9.0), ("z", 1.0), ("a", 1.0)):
            idle.add(model, key)
        assert list(idle) == ["z", "a", "dear"]
        assert [idle.key(model) for model in idle] == [1.0, 1.0, 9.0]
        assert len(idle) == 3

    def test_to_add_it_again_puts_it_elsewhere(self) -> None:
        idle = Idle()
        for model, key in (("a", 1.0), ("b", 1.0), ("c", 5.0), ("c", 0.0), ("a", 1.0)):
            idle.add(model, key)
        assert list(idle) == ["c", "b", "a"]

    def test_who_is_taken_out_is_not_in_it(self) -> None:
        idle = Idle()
        for number, model in enumerate("abc"):
            idle.add(model, float(number))
        idle.remove("b")
        idle.remove("b")
        idle.remove("nobody")
        assert list(idle) == ["a", "c"]
        assert "a" in idle
        assert "b" not in idle
