"""Who is loaded where memory is short, who goes for it, and who waits, behaviour by behaviour."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mlxsup.scheduling import effects as fx
from mlxsup.scheduling import events as ev
from mlxsup.scheduling.eviction import choose
from mlxsup.scheduling.ledger import Device
from mlxsup.scheduling.scheduler import Limits

from .driving import GIB, Short, changes, granted, model, only, rejected, spawned, stopped


class TestRoom:
    def test_what_fits_side_by_side_is_loaded_side_by_side(self) -> None:
        driver = Short(3, a=model(1), b=model(2), c=model(1))
        assert spawned(driver.acquire("a")[1]) == ["a"]
        assert spawned(driver.acquire("b")[1]) == ["b"]
        assert spawned(driver.acquire("c")[1]) == []
        assert driver.view("c").claimed

    def test_the_place_it_gets_is_in_the_effect(self) -> None:
        driver = Short(3, a=model(2))
        (spawn,) = only(driver.acquire("a")[1], fx.Spawn)
        assert spawn.shares == {"cpu": 2 * GIB}
        assert driver.view("a").reserved == {"cpu": 2 * GIB}

    def test_one_that_loads_is_not_put_out(self) -> None:
        driver = Short(1, a=model(1), b=model(1))
        driver.load("a")
        assert stopped(driver.acquire("b")[1]) == []
        assert stopped(driver.ready("a")) == ["a"]

    def test_a_leased_one_is_not_put_out_and_goes_when_it_is_idle(self) -> None:
        driver = Short(1, a=model(1), b=model(1))
        lease = driver.leased("a")
        ticket, found = driver.acquire("b")
        assert stopped(found) == []
        assert stopped(driver.release(lease, "a")) == ["a"]
        assert spawned(driver.gone(model="a")) == ["b"]
        assert granted(driver.ready("b")) == [ticket]

    def test_nobody_goes_where_all_together_are_not_enough(self) -> None:
        driver = Short(3, idle=model(1), busy=model(2), big=model(3))
        driver.loaded("idle")
        driver.leased("busy")
        assert stopped(driver.acquire("big")[1]) == []

    def test_no_more_go_than_are_needed(self) -> None:
        driver = Short(4, a=model(1), b=model(1), c=model(2), d=model(2))
        for name in "abc":
            driver.loaded(name)
        for name in "c":
            driver.release(driver.acquire(name)[0], name)
        assert len(stopped(driver.acquire("d")[1])) in (1, 2)
        assert driver.scheduler.ledger.accounts["cpu"].soon >= 2 * GIB

    def test_a_waiter_who_leaves_puts_nobody_out(self) -> None:
        driver = Short(1, a=model(1), b=model(1))
        lease = driver.leased("a")
        ticket, _ = driver.acquire("b")
        driver.cancel(ticket, "b")
        assert stopped(driver.release(lease, "a")) == []

    def test_what_could_never_fit_is_refused_for_good_at_once(self) -> None:
        driver = Short(2, a=model(1), big=model(3))
        driver.loaded("a")
        ticket, found = driver.acquire("big")
        assert rejected(found) == {ticket: "does_not_fit"}
        error = only(found, fx.Reject)[0].error
        assert error.message == "model requires 3.0 GiB but only 2.0 GiB are available (after 0 B overhead)"
        assert error.details["permanent"]
        assert stopped(found) == []

    def test_what_never_fits_is_refused_at_once_behind_others_too(self) -> None:
        driver = Short(2, a=model(2), b=model(2), big=model(3))
        driver.leased("a")
        driver.acquire("b")
        ticket, found = driver.acquire("big")
        assert rejected(found) == {ticket: "does_not_fit"}

    def test_pinned_ones_stay_and_that_is_said(self) -> None:
        driver = Short(2, a=model(1, pinned=True), big=model(2))
        driver.loaded("a")
        _, found = driver.acquire("big")
        error = only(found, fx.Reject)[0].error
        assert "pinned" in error.message
        assert "permanent" not in error.details

    def test_a_young_one_stays_until_it_is_old_enough(self) -> None:
        driver = Short(1, Limits(min_residency=5), a=model(1), b=model(1))
        driver.loaded("a")
        assert stopped(driver.acquire("b")[1]) == []
        assert stopped(driver.after(4.9)) == []
        assert stopped(driver.after(0.2)) == ["a"]

    def test_so_many_and_no_more(self) -> None:
        driver = Short(9, Limits(max_loaded=2), a=model(1), b=model(1), c=model(1))
        driver.loaded("a")
        driver.loaded("b")
        assert len(stopped(driver.acquire("c")[1])) == 1


class TestOrder:
    def test_the_cheap_and_large_go_before_the_dear_and_small(self) -> None:
        driver = Short(4, slow=model(1), large=model(2), new=model(2))
        driver.load("slow")
        driver.after(60)
        driver.ready("slow")
        driver.load("large")
        driver.after(5)
        driver.ready("large")
        assert driver.scheduler.idle[0] == "large"
        driver.after(1)
        assert stopped(driver.load("new")[1]) == ["large"]

    def test_priority_is_worth_something(self) -> None:
        driver = Short(2, high=model(1, priority="high"), plain=model(1), new=model(1))
        for name in ("high", "plain"):
            driver.load(name)
            driver.after(2)
            driver.ready(name)
        assert stopped(driver.load("new")[1]) == ["plain"]

    def test_of_equals_the_one_that_has_been_idle_longest(self) -> None:
        driver = Short(2, z=model(1), a=model(1), new=model(1))
        for name in ("z", "a"):
            driver.load(name)
            driver.after(2)
            driver.ready(name)
        assert driver.scheduler.idle == ["z", "a"]
        assert stopped(driver.load("new")[1]) == ["z"]

    def test_the_sums_are_told(self) -> None:
        driver = Short(1, a=model(1), b=model(1))
        driver.loaded("a")
        driver.acquire("b")
        assert driver.view("a").reason.startswith("put out for b: b needs 1.0 GiB on cpu, 0 B are free; credit")


@given(
    lacking=st.dictionaries(st.sampled_from("xy"), st.integers(-3, 12), min_size=1),
    frees=st.lists(st.dictionaries(st.sampled_from("xyz"), st.integers(0, 6)), max_size=6),
)
def test_a_choice_is_enough_and_nobody_in_it_can_be_spared(
    lacking: dict[str, int], frees: list[dict[str, int]]
) -> None:
    candidates = [(str(number), each) for number, each in enumerate(frees)]
    of = dict(candidates)

    def enough(names: tuple[str, ...] | list[str]) -> bool:
        return all(sum(of[name].get(each, 0) for name in names) >= size for each, size in lacking.items())

    chosen = choose(lacking, candidates)
    if chosen is None:
        assert not enough(list(of))
        return
    assert enough(chosen)
    for spared in chosen:
        assert not enough([name for name in chosen if name != spared])


class TestWaiting:
    def test_the_victim_asked_for_again_comes_after_who_it_went_for(self) -> None:
        driver = Short(1, a=model(1, priority="high"), b=model(1))
        driver.loaded("a")
        first, _ = driver.acquire("b")
        second, found = driver.acquire("a")
        assert found == []
        assert spawned(driver.gone(model="a")) == ["b"]
        assert granted(driver.ready("b")) == [first]
        found = driver.release(first, "b")
        assert stopped(found) == ["b"]
        assert spawned(driver.gone(model="b")) == ["a"]
        assert granted(driver.ready("a")) == [second]

    def test_priority_first_but_nobody_starves(self) -> None:
        driver = Short(1, busy=model(1), low=model(1, priority="low"), high=model(1, priority="high"))
        lease = driver.leased("busy")
        driver.acquire("low")
        driver.acquire("high")
        driver.release(lease, "busy")
        assert spawned(driver.gone(model="busy")) == ["high"]

    def test_an_old_low_one_comes_before_a_new_high_one(self) -> None:
        driver = Short(
            1, Limits(patience=1e9), busy=model(1), low=model(1, priority="low"), high=model(1, priority="high")
        )
        lease = driver.leased("busy")
        driver.acquire("low")
        driver.after(121)
        driver.acquire("high")
        driver.release(lease, "busy")
        assert spawned(driver.gone(model="busy")) == ["low"]

    def test_a_model_that_is_always_busy_is_drained_for_who_has_waited_long(self) -> None:
        driver = Short(1, Limits(patience=15), busy=model(1, concurrency=2), other=model(1))
        first = driver.leased("busy")
        driver.after(1)
        waiting, _ = driver.acquire("other")
        second, found = driver.acquire("busy")
        assert granted(found) == [second], "a ready model is granted at once"
        assert changes(driver.after(15)) == [("ready", "draining")]
        late, found = driver.acquire("busy")
        assert granted(found) == []
        assert driver.release(first, "busy") == []
        assert stopped(driver.release(second, "busy")) == ["busy"]
        assert spawned(driver.gone(model="busy")) == ["other"]
        assert granted(driver.ready("other")) == [waiting]
        driver.release(waiting, "other")
        driver.gone(model="other")
        assert granted(driver.ready("busy")) == [late]

    def test_a_drain_for_others_ends_no_work(self) -> None:
        driver = Short(1, Limits(patience=15), busy=model(1, drain_timeout=30.0), other=model(1))
        driver.leased("busy")
        driver.acquire("other")
        driver.after(10_000)
        assert driver.state("busy") == "draining"
        assert stopped(driver.unload("busy")[1]) == []
        assert stopped(driver.after(30)) == ["busy"], "but an unload has its deadline"

    def test_small_ones_pass_a_large_one_only_for_a_while(self) -> None:
        driver = Short(3, Limits(patience=15), busy=model(2), large=model(3), small=model(1), late=model(1))
        driver.leased("busy")
        driver.acquire("large")
        small, found = driver.acquire("small")
        assert spawned(found) == ["small"]
        driver.ready("small")
        driver.after(15)
        driver.release(small, "small")
        driver.gone(model="small")
        assert spawned(driver.acquire("late")[1]) == []


class TestMemoryThatComesBack:
    def test_the_next_load_waits_until_it_is_really_back(self) -> None:
        driver = Short(3, a=model(2), b=model(2))
        driver.sampled(3)
        driver.loaded("a")
        driver.sampled(1, a=2)
        driver.acquire("b")
        found = driver.gone(model="a")
        assert spawned(found) == []
        assert only(found, fx.Look)
        assert spawned(driver.sampled(1.5)) == []
        assert only(driver.after(0.1), fx.Look)
        assert spawned(driver.sampled(3)) == ["b"]

    def test_but_not_for_ever(self) -> None:
        driver = Short(3, a=model(2), b=model(2))
        driver.sampled(3)
        driver.loaded("a")
        driver.sampled(1, a=2)
        ticket, _ = driver.acquire("b")
        driver.gone(model="a")
        assert driver.after(4.9)[-1] == fx.Look()
        assert rejected(driver.after(15.0)) == {}
        found = driver.after(0.3)
        assert rejected(found) == {ticket: "does_not_fit"}
        assert "permanent" not in only(found, fx.Reject)[0].error.details

    def test_the_smaller_figure_counts(self) -> None:
        driver = Short(8, a=model(2))
        driver.sampled(1)
        assert spawned(driver.acquire("a")[1]) == []
        assert spawned(driver.sampled(2)) == ["a"]

    def test_who_lacks_what_other_programs_hold_waits_for_it_a_while_and_may_come_again(self) -> None:
        driver = Short(8, Limits(patience=15), a=model(2))
        driver.sampled(1)
        ticket, found = driver.acquire("a")
        assert not found
        assert "queued for a moment" in driver.explained("a")
        assert rejected(driver.after(14.9) + driver.sampled(1)) == {}
        found = driver.after(0.2)
        assert rejected(found) == {ticket: "does_not_fit"}
        (error,) = [effect.error for effect in only(found, fx.Reject)]
        assert error.retry_after == 15
        assert "permanent" not in error.details
        assert str(error).endswith(
            "only 1.0 GiB are available (after 0 B overhead); other programs hold what is missing"
        )
        assert driver.scheduler.wake_at() is None
        again, found = driver.acquire("a")
        assert not rejected(found), "it is not remembered"
        assert spawned(driver.sampled(2)) == ["a"]
        assert granted(driver.ready("a")) == [again]

    def test_a_moment_of_little_memory_refuses_nobody_who_has_waited_long(self) -> None:
        driver = Short(4, Limits(patience=15), busy=model(3), b=model(3))
        driver.sampled(4)
        lease = driver.leased("busy")
        ticket, _ = driver.acquire("b")
        driver.after(60)
        for _ in range(3):
            assert rejected(driver.sampled(0.5, busy=1) + driver.after(14)) == {}
            assert rejected(driver.sampled(3, busy=1)) == {}
        driver.release(lease, "busy")
        assert spawned(driver.gone(model="busy")) == ["b"]
        assert granted(driver.ready("b")) == [ticket]

    def test_who_waits_for_other_programs_keeps_nobody_smaller_from_loading(self) -> None:
        driver = Short(8, big=model(6), small=model(2))
        driver.sampled(3)
        driver.acquire("big")
        assert spawned(driver.acquire("small")[1]) == ["small"]

    def test_passing_growth_of_pinned_ones_is_waited_for_and_what_they_reserve_is_not(self) -> None:
        driver = Short(4, p=model(2, pinned=True), b=model(2), c=model(3))
        driver.loaded("p")
        driver.sampled(4, p=3)
        ticket, found = driver.acquire("c")
        assert rejected(found) == {ticket: "does_not_fit"}
        assert only(found, fx.Reject)[0].error.retry_after
        assert not rejected(driver.acquire("b")[1])
        assert spawned(driver.sampled(4, p=2)) == ["b"]

    def test_what_is_to_be_there_from_the_start_does_not_fail_by_other_programs(self) -> None:
        driver = Short(8, a=model(2, preload=True))
        driver.sampled(1)
        (notice,) = driver.tell(ev.Start())
        assert isinstance(notice, fx.Noticed)
        assert driver.state("a") == "stopped"

    def test_what_is_reserved_and_not_used_yet_is_not_free(self) -> None:
        driver = Short(8, a=model(2), b=model(2))
        driver.sampled(3)
        driver.acquire("a")
        driver.sampled(3, a=0.1)
        assert spawned(driver.acquire("b")[1]) == []

    def test_growth_is_noticed_once_and_counts(self) -> None:
        driver = Short(3, a=model(1), b=model(2))
        driver.loaded("a")
        (notice,) = only(driver.sampled(3, a=1.5), fx.Noticed)
        assert notice.reason == "uses 1.5 GiB of cpu where 1.0 GiB were reserved"
        assert only(driver.sampled(3, a=1.5), fx.Noticed) == []
        assert stopped(driver.acquire("b")[1]) == ["a"]

    def test_idle_ones_go_when_other_programs_take_the_memory(self) -> None:
        driver = Short(8, a=model(1), b=model(1))
        driver.loaded("a")
        lease = driver.leased("b")
        device = Device(name="cpu", total=8 * GIB, minimum=GIB)
        policies = {"a": model(1), "b": model(1)}
        driver.tell(ev.Reconfigure(policies=policies, queue=9, limits=Limits(), devices=(device,)))
        found = driver.sampled(0.5, a=1, b=1)
        assert stopped(found) == ["a"]
        driver.gone(model="a")
        driver.after(5)
        (notice,) = only(driver.sampled(0.2, b=1) + driver.sampled(0.2, b=1), fx.Noticed)
        assert "no idle model" in notice.reason
        driver.release(lease, "b")
        assert stopped(driver.sampled(0.2, b=1)) == ["b"]


class TestNeeds:
    """What was learnt may be more than there ever is; an estimate that fits still gives the model its chance."""

    @staticmethod
    def weighed(driver: Short, need: float, least: float, source: str = "learnt") -> tuple[int, list[fx.Effect]]:
        ticket, found = driver.acquire("m")
        (question,) = only(found, fx.Weigh)
        need, least = int(need * GIB), int(least * GIB)
        return ticket, driver.tell(ev.Weighed("m", question.attempt, need, 0.0, least, source))

    def test_what_was_learnt_counts_as_all_there_is_where_it_is_more(self) -> None:
        driver = Short(devices=(Device(name="cpu", total=4 * GIB, minimum=GIB),), m=model(memory=None))
        _, found = self.weighed(driver, 5, 2)
        assert [spawn.shares for spawn in only(found, fx.Spawn)] == [{"cpu": 3 * GIB}]

    def test_beside_a_pinned_one_it_is_what_that_leaves(self) -> None:
        driver = Short(4, m=model(memory=None), p=model(1, pinned=True))
        driver.loaded("p")
        _, found = self.weighed(driver, 4, 2)
        assert [spawn.shares for spawn in only(found, fx.Spawn)] == [{"cpu": 3 * GIB}]

    def test_on_several_cards_it_is_what_they_have_together(self) -> None:
        two = (Device(name="cuda:0", total=4 * GIB), Device(name="cuda:1", total=3 * GIB))
        driver = Short(devices=two, m=model(memory=None, devices=("cuda:0", "cuda:1"), spread=2))
        _, found = self.weighed(driver, 9, 5)
        assert [spawn.shares for spawn in only(found, fx.Spawn)] == [{"cuda:0": 3 * GIB, "cuda:1": 3 * GIB}]

    def test_others_go_for_it_as_for_anybody(self) -> None:
        driver = Short(4, m=model(memory=None), a=model(1))
        driver.loaded("a")
        assert stopped(self.weighed(driver, 5, 2)[1]) == ["a"]

    def test_where_the_estimate_is_too_much_as_well_the_source_is_told(self) -> None:
        driver = Short(4, m=model(memory=None))
        ticket, found = self.weighed(driver, 6, 5, "learnt yesterday: say models.m.memory")
        assert rejected(found) == {ticket: "does_not_fit"}
        (error,) = [effect.error for effect in only(found, fx.Reject)]
        assert error.message == (
            "model requires 6.0 GiB but only 4.0 GiB are available (after 0 B overhead);"
            " its need is learnt yesterday: say models.m.memory"
        )
        assert error.details["permanent"]

    def test_where_other_programs_hold_memory_for_long_it_does_with_what_they_leave(self) -> None:
        driver = Short(8, Limits(patience=15), m=model(memory=None))
        driver.sampled(5)
        _, found = self.weighed(driver, 6, 2)
        assert spawned(found + driver.after(14.9)) == []
        (spawn,) = only(driver.after(0.2), fx.Spawn)
        assert 4.5 * GIB < spawn.shares["cpu"] < 5 * GIB
        driver.unload("m")
        driver.gone(model="m")
        driver.sampled(1)
        ticket, found = self.weighed(driver, 6, 2)
        assert rejected(found + driver.after(15.1)) == {ticket: "does_not_fit"}

    def test_what_can_never_be_is_not_waited_for(self) -> None:
        driver = Short(8, m=model(memory=None))
        driver.sampled(5)
        (spawn,) = only(self.weighed(driver, 9, 2)[1], fx.Spawn)
        assert 4.5 * GIB < spawn.shares["cpu"] < 5 * GIB

    def test_what_was_declared_is_meant(self) -> None:
        driver = Short(4, m=model(memory=None))
        ticket, found = self.weighed(driver, 5, 5, "declared")
        assert rejected(found) == {ticket: "does_not_fit"}

    def test_one_whose_files_hang_keeps_nobody_from_being_preloaded_for_long(self) -> None:
        driver = Short(4, hangs=model(memory=None, preload=True, priority="high"), b=model(1, preload=True))
        assert spawned(driver.tell(ev.Start())) == [], "the first in rank has the first choice"
        assert driver.view("hangs").weighing
        assert spawned(driver.after(15.1)) == ["b"]


class TestDevices:
    TWO = (Device(name="cuda:0", total=4 * GIB), Device(name="cuda:1", total=4 * GIB))

    def test_where_it_fits_with_the_least_eviction(self) -> None:
        cards = ("cuda:0", "cuda:1")
        driver = Short(devices=self.TWO, a=model(3, devices=("cuda:0",)), b=model(3, devices=cards))
        driver.loaded("a")
        (spawn,) = only(driver.acquire("b")[1], fx.Spawn)
        assert spawn.shares == {"cuda:1": 3 * GIB}

    def test_on_as_many_as_it_needs(self) -> None:
        cards = ("cuda:0", "cuda:1")
        driver = Short(
            devices=self.TWO, small=model(3, devices=cards, spread=2), large=model(6, devices=cards, spread=2)
        )
        (spawn,) = only(driver.acquire("small")[1], fx.Spawn)
        assert len(spawn.shares) == 1
        driver.ready("small")
        ticket = len(driver.scheduler.view("small").reserved)
        driver.tell(ev.Release(1, "small"))
        found = driver.acquire("large")[1]
        assert stopped(found) == ["small"]
        (spawn,) = only(driver.gone(model="small"), fx.Spawn)
        assert spawn.shares == {"cuda:0": 3 * GIB, "cuda:1": 3 * GIB}
        assert ticket == 1

    def test_a_full_card_keeps_nobody_from_the_other(self) -> None:
        driver = Short(
            devices=self.TWO,
            a=model(4, devices=("cuda:0",)),
            b=model(4, devices=("cuda:0",)),
            c=model(4, devices=("cuda:1",)),
        )
        driver.leased("a")
        driver.acquire("b")
        assert spawned(driver.acquire("c")[1]) == ["c"]
