"""The examples of docs/swap-in.md, ``## Hugging Face generate``, run as they stand."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_examples_run() -> None:
    page = (ROOT / "docs" / "swap-in.md").read_text()
    section = re.search(r"^## Hugging Face generate\n(.*?)(?=^## |\Z)", page, re.M | re.S)
    assert section is not None
    blocks = re.findall(r"^```python\n(.*?)^```", section[1], re.M | re.S)
    assert len(blocks) == 3
    run = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        cwd=ROOT,
    )
    assert run.returncode == 0, run.stderr
    said = re.fullmatch(r"([\d,]+) bytes of keys and values in ([\d,]+) of memory\n", run.stdout)
    assert said is not None, run.stdout
    logical, committed = (int(number.replace(",", "")) for number in said.groups())
    assert committed < logical
