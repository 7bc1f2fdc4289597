"""The Python in README.md runs as it is written."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"(?ms)^```python\n(.*?)^```", (ROOT / "README.md").read_text())
PROGRAMS = [block for block in BLOCKS if "Supervisor" in block]


@pytest.mark.skipif(not PROGRAMS, reason="README.md holds no program yet")
@pytest.mark.timeout(60)
@pytest.mark.parametrize("program", PROGRAMS, ids=range(len(PROGRAMS)))
def test_programs_of_the_readme_run(program: str, tmp_path: Path) -> None:
    if ".run(" not in program:  # lines to be put into a coroutine
        program = f"import asyncio\nfrom pathlib import Path\nasync def main():\n{textwrap.indent(program, '    ')}\nasyncio.run(main())\n"
    shutil.copy(ROOT / "config.example.toml", tmp_path / "config.toml")
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in re.findall(r'Path\("([\w.]+\.png)"\)\.write_bytes', program):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
