"""The sums of memory: what is given out, what was measured, what is on its way back, and how a refusal puts it."""

from __future__ import annotations

import pytest

from mlxsup.scheduling.ledger import SLOTS, Account, Device, Ledger, refusal

from .driving import GIB

MIB = 1 << 20


def ledger(cpu: float = 8, *, gpu: float = 0, max_loaded: int = 0) -> Ledger:
    devices = [Device(name="cpu", total=int(cpu * GIB))]
    if gpu:
        devices.append(Device(name="gpu", total=int(gpu * GIB)))
    return Ledger(devices, max_loaded)


class TestSums:
    def test_what_is_reserved_is_not_available(self) -> None:
        books = ledger(8)
        books.reserve("a", {"cpu": 3 * GIB}, pinned=False)
        assert books.accounts["cpu"].available == 5 * GIB
        assert books.counted("a") == {"cpu": 3 * GIB}
        assert books.counted("nobody") == {}

    def test_what_is_measured_counts_where_it_is_more(self) -> None:
        books = ledger(8, gpu=8)
        books.reserve("a", {"cpu": 3 * GIB, "gpu": 3 * GIB}, pinned=False)
        books.measure("a", {"cpu": GIB, "gpu": 4 * GIB})
        assert books.counted("a") == {"cpu": 3 * GIB, "gpu": 4 * GIB}
        assert books.accounts["cpu"].available == 5 * GIB
        assert books.accounts["gpu"].available == 4 * GIB

    def test_use_of_a_device_that_was_not_reserved_counts_too(self) -> None:
        books = ledger(8, gpu=8)
        books.reserve("a", {"cpu": GIB}, pinned=False)
        books.measure("a", {"gpu": 2 * GIB})
        assert books.counted("a") == {"cpu": GIB, "gpu": 2 * GIB}
        assert books.accounts["gpu"].available == 6 * GIB

    def test_a_device_that_nobody_knows_is_not_counted(self) -> None:
        books = ledger(8)
        books.reserve("a", {"elsewhere": GIB, "cpu": GIB}, pinned=False)
        assert books.accounts["cpu"].available == 7 * GIB

    def test_who_goes_leaves_its_room_soon_and_gives_it_back_when_it_is_gone(self) -> None:
        books = ledger(8)
        books.reserve("a", {"cpu": 3 * GIB}, pinned=False)
        books.depart("a", departing=True)
        books.depart("a", departing=True)
        account = books.accounts["cpu"]
        assert (account.available, account.soon) == (5 * GIB, 8 * GIB)
        books.release("a", 0.0)
        assert (account.available, account.soon) == (8 * GIB, 8 * GIB)

    def test_who_is_not_to_go_after_all_keeps_its_room(self) -> None:
        books = ledger(8)
        books.reserve("a", {"cpu": 3 * GIB}, pinned=False)
        books.depart("a", departing=True)
        books.depart("a", departing=False)
        assert books.accounts["cpu"].soon == 5 * GIB

    def test_what_is_pinned_is_out_of_reach(self) -> None:
        books = ledger(8)
        books.reserve("a", {"cpu": 3 * GIB}, pinned=True)
        books.reserve("b", {"cpu": 2 * GIB}, pinned=False)
        assert books.accounts["cpu"].reach == 5 * GIB
        books.pin("b", pinned=True)
        books.pin("b", pinned=True)
        assert books.accounts["cpu"].reach == 3 * GIB
        books.pin("a", pinned=False)
        assert books.accounts["cpu"].reach == 6 * GIB

    def test_a_pinned_one_on_its_way_out_is_within_reach(self) -> None:
        books = ledger(8)
        books.reserve("a", {"cpu": 3 * GIB}, pinned=True)
        books.depart("a", departing=True)
        assert (books.accounts["cpu"].reach, books.accounts["cpu"].utmost) == (8 * GIB, 8 * GIB)
        books.depart("a", departing=False)
        assert (books.accounts["cpu"].reach, books.accounts["cpu"].utmost) == (5 * GIB, 5 * GIB)

    def test_what_a_pinned_one_has_outgrown_may_pass(self) -> None:
        books = ledger(8)
        books.reserve("a", {"cpu": 3 * GIB}, pinned=True)
        books.measure("a", {"cpu": 4 * GIB})
        assert (books.accounts["cpu"].reach, books.accounts["cpu"].utmost) == (4 * GIB, 5 * GIB)

    def test_nothing_happens_to_a_model_that_has_nothing(self) -> None:
        books = ledger(8)
        books.release("nobody", 5.0)
        books.depart("nobody", departing=True)
        books.pin("nobody", pinned=True)
        assert books.measure("nobody", {"cpu": GIB}) is False
        assert books.accounts["cpu"].available == 8 * GIB

    def test_an_overdrawn_device_lacks_what_it_gave_out_too_much(self) -> None:
        books = ledger(2)
        books.reserve("a", {"cpu": 3 * GIB}, pinned=False)
        assert books.accounts["cpu"].shortage == GIB
        books.depart("a", departing=True)
        assert books.accounts["cpu"].shortage == 0

    def test_the_capacity_is_that_of_all_devices_without_what_is_kept_back(self) -> None:
        devices = [Device(name="a", total=5, minimum=1, overhead=1), Device(name="b", total=1, minimum=2)]
        assert Ledger(devices, max_loaded=7).capacity == 3


class TestWhatTheSystemSays:
    def test_the_smaller_figure_is_believed(self) -> None:
        books = ledger(8)
        books.see({"cpu": GIB})
        assert books.accounts["cpu"].available == GIB
        books.see({"cpu": 99 * GIB})
        assert books.accounts["cpu"].available == 8 * GIB

    def test_devices_that_are_not_ours_are_passed_over(self) -> None:
        books = ledger(8)
        books.see({"elsewhere": GIB, "cpu": 2 * GIB})
        assert books.accounts["cpu"].available == 2 * GIB

    def test_what_is_reserved_and_not_in_use_yet_is_called_free_by_mistake(self) -> None:
        books = ledger(8)
        books.reserve("a", {"cpu": 3 * GIB}, pinned=False)
        books.see({"cpu": 4 * GIB})
        assert books.accounts["cpu"].available == GIB
        books.measure("a", {"cpu": 2 * GIB})
        assert books.accounts["cpu"].available == 3 * GIB

    def gone(self) -> Ledger:
        """A ledger whose model is gone, and whose memory the system shows as taken still."""
        books = ledger(8)
        books.see({"cpu": 8 * GIB})
        books.reserve("a", {"cpu": 3 * GIB}, pinned=False)
        books.measure("a", {"cpu": 2 * GIB})
        books.see({"cpu": 5 * GIB})
        books.release("a", 10.0)
        return books

    def test_memory_of_the_gone_is_expected_back_and_not_available(self) -> None:
        account = self.gone().accounts["cpu"]
        assert (account.available, account.soon, account.reach) == (5 * GIB, 7 * GIB, 7 * GIB)

    def test_what_comes_back_is_expected_no_more(self) -> None:
        books = self.gone()
        account = books.accounts["cpu"]
        books.see({"cpu": 5 * GIB})
        assert account.soon == 7 * GIB
        books.see({"cpu": 6 * GIB})
        assert (account.available, account.soon) == (6 * GIB, 7 * GIB)
        assert books.settle(9.0)
        books.see({"cpu": 4 * GIB})
        assert account.soon == 5 * GIB, "what others take meanwhile is no sign of anything"
        books.see({"cpu": 8 * GIB})
        assert account.soon == 8 * GIB
        assert not books.settle(9.0)

    def test_memory_of_two_that_are_gone_is_expected_together(self) -> None:
        books = self.gone()
        books.reserve("b", {"cpu": GIB}, pinned=False)
        books.measure("b", {"cpu": GIB})
        books.release("b", 20.0)
        assert books.accounts["cpu"].soon == 8 * GIB
        assert books.settle(19.9)
        assert not books.settle(20.0)

    def test_it_is_not_expected_for_ever(self) -> None:
        books = self.gone()
        assert books.settle(9.9)
        assert not books.settle(10.0)
        assert books.accounts["cpu"].soon == 5 * GIB

    def test_where_nobody_asks_the_system_nothing_is_waited_for(self) -> None:
        books = ledger(8)
        books.reserve("a", {"cpu": GIB, "elsewhere": GIB}, pinned=False)
        books.measure("a", {"elsewhere": GIB, "cpu": GIB})
        books.release("a", 10.0)
        assert not books.settle(0.0)

    def test_one_device_that_waits_is_enough(self) -> None:
        books = ledger(8, gpu=8)
        books.see({"cpu": 8 * GIB})
        books.reserve("a", {"cpu": GIB, "gpu": GIB}, pinned=False)
        books.measure("a", {"elsewhere": 1, "cpu": GIB, "gpu": GIB})
        books.release("a", 10.0)
        assert books.settle(0.0)


class TestGrowth:
    def test_a_little_is_not_worth_a_word(self) -> None:
        books = ledger(8)
        books.reserve("a", {"cpu": GIB}, pinned=False)
        assert not books.measure("a", {"cpu": GIB + 32 * MIB})
        assert books.measure("a", {"cpu": GIB + 32 * MIB + 1})

    def test_it_is_spoken_of_again_when_it_has_grown_by_a_tenth_more(self) -> None:
        books = ledger(8)
        books.reserve("a", {"cpu": GIB}, pinned=False)
        assert books.measure("a", {"cpu": GIB + 1000 * MIB})
        assert not books.measure("a", {"cpu": GIB + 1100 * MIB})
        assert books.measure("a", {"cpu": GIB + 1101 * MIB})
        assert not books.measure("a", {"cpu": GIB + 1200 * MIB})

    def test_what_is_spared_on_one_device_makes_up_for_nothing_on_another(self) -> None:
        books = ledger(8, gpu=8)
        books.reserve("a", {"cpu": GIB, "gpu": GIB}, pinned=False)
        assert not books.measure("a", {"cpu": GIB + 32 * MIB, "gpu": 0})
        assert books.measure("a", {"cpu": GIB + 33 * MIB})

    def test_a_device_that_was_never_reserved_is_no_growth(self) -> None:
        books = ledger(8, gpu=8)
        books.reserve("a", {"cpu": GIB}, pinned=False)
        assert not books.measure("a", {"gpu": 2 * GIB})


class TestPlaces:
    def test_where_models_are_counted_each_takes_a_place(self) -> None:
        books = ledger(8, max_loaded=2)
        assert books.known({"cpu": GIB}) == {"cpu": GIB, SLOTS: 1}
        assert ledger(8).known({"cpu": GIB}) == {"cpu": GIB}

    def test_places_come_and_go_with_the_configuration(self) -> None:
        books = ledger(8)
        books.reserve("a", books.known({"cpu": GIB}), pinned=True)
        books.refit([Device(name="cpu", total=4 * GIB)], 3)
        account = books.accounts[SLOTS]
        assert (account.device.total, account.counted, account.pinned) == (3, 1, 1)
        assert books.accounts["cpu"].available == 3 * GIB
        books.refit([Device(name="cpu", total=4 * GIB)], 0)
        assert SLOTS not in books.accounts
        assert books.counted("a") == {"cpu": GIB}

    def test_what_the_system_said_outlives_a_change_of_the_configuration(self) -> None:
        books = ledger(8)
        books.see({"cpu": 5 * GIB})
        books.reserve("a", {"cpu": 2 * GIB}, pinned=False)
        books.measure("a", {"cpu": 2 * GIB})
        books.release("a", 10.0)
        books.accounts["cpu"].low = True
        books.refit([Device(name="new", total=GIB), Device(name="cpu", total=9 * GIB)], 0)
        account = books.accounts["cpu"]
        assert (account.free, account.available, account.soon, account.low) == (5 * GIB, 5 * GIB, 7 * GIB, True)
        assert books.settle(9.9)
        assert not books.settle(10.0)
        assert books.accounts["new"].free is None


class TestRefusals:
    ACCOUNT = Account(Device(name="cpu", total=4 * GIB, minimum=GIB // 2, overhead=GIB // 2))

    def test_the_figures_are_for_people_and_for_programs(self) -> None:
        error = refusal(self.ACCOUNT, 5 * GIB, 3 * GIB, retry_after=7.0)
        assert error.message == "model requires 5.0 GiB but only 3.0 GiB are available (after 1.0 GiB overhead)"
        assert error.details == {"device": "cpu", "required": 5 * GIB, "available": 3 * GIB, "overhead": GIB}
        assert error.retry_after == 7.0

    def test_why_and_for_how_long(self) -> None:
        error = refusal(self.ACCOUNT, 5 * GIB, 3 * GIB, retry_after=None, why="2 B are held by pinned models")
        assert error.message.endswith("(after 1.0 GiB overhead); 2 B are held by pinned models")
        assert error.details["permanent"] is True
        assert error.retry_after is None

    def test_what_is_available_is_never_less_than_nothing(self) -> None:
        error = refusal(self.ACCOUNT, 5 * GIB, -GIB, retry_after=7.0)
        assert "but only 0 B are available" in error.message
        assert error.details["available"] == 0

    @pytest.mark.parametrize(
        ("need", "available", "figures"),
        [
            (4 * GIB + MIB, 4 * GIB, "4097MiB but only 4GiB are"),
            (4 * GIB, 4 * GIB - 1, "4GiB but only 4294967295B are"),
        ],
    )
    def test_figures_that_look_alike_are_given_exactly(self, need: int, available: int, figures: str) -> None:
        assert f"requires {figures}" in refusal(self.ACCOUNT, need, available, retry_after=7.0).message

    def test_too_many_models_are_no_matter_of_bytes(self) -> None:
        error = refusal(Account(Device(name=SLOTS, total=2)), 1, 0, retry_after=7.0)
        assert error.message == "max_loaded is 2, and all that are loaded are pinned"
        assert error.details == {"max_loaded": 2}
        assert error.retry_after == 7.0
