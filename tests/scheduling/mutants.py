"""What came of the mutants of the scheduler: `python -m tests.scheduling.mutants`, after mutmut has run (`make mutants` does both).

The score is the part of all mutants that a test notices, by a failure or by taking far too long. Those that no test reaches
count as not noticed.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table

FLOOR: Final = 85.0
"""Per cent."""

OUTCOMES: Final = {
    0: "survived",
    1: "killed",
    3: "killed",
    33: "untested",
    36: "timeout",
    -24: "timeout",
    152: "timeout",
}
"""By what mutmut writes down, the end of the test run; anything else is one that crashed, or None: one that never ran."""


def main() -> int:
    """Show the counts by module; 1 when the tests notice too little, or not all mutants have run."""
    table = Table("module", *(columns := ["killed", "timeout", "survived", "untested", "other"]), "score")
    total = Counter[str]()
    for path in sorted(Path("mutants/mlxsup/scheduling").glob("*.meta")):
        codes = json.loads(path.read_bytes())["exit_code_by_key"].values()
        counts = Counter(OUTCOMES.get(code, "other") for code in codes)
        total += counts
        if counts:
            table.add_row(
                path.name.partition(".")[0], *(str(counts[each]) for each in columns), f"{score(counts):.1f} %"
            )
    table.add_row("all", *(str(total[each]) for each in columns), f"{score(total):.1f} %", style="bold")
    Console().print(table)
    return int(score(total) < FLOOR or bool(total["other"]))


def score(counts: Counter[str]) -> float:
    """Return per cent."""
    return 100 * (counts["killed"] + counts["timeout"]) / max(1, counts.total())


if __name__ == "__main__":
    sys.exit(main())
