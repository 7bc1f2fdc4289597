"""Runs of thousands: what must not grow however long it goes on (`make soak`), what must not fail once in twenty (`make flaky`)."""
