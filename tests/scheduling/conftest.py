"""The scheduler starts nothing and opens nothing."""

from __future__ import annotations

import os

import pytest

if "MUTANT_UNDER_TEST" in os.environ:

    @pytest.fixture(autouse=True)
    def nothing_left_behind() -> None:
        """Look for nothing that was left behind: among thousands of mutants this would take most of the time."""
