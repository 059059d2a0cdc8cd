"""The worked example of docs/operations.md: its commands print what stands there."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs" / "operations.md"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# It says what the machine had free then.
FREE_THEN = re.compile(r"^ Memory available .*$", re.MULTILINE)


def test_the_memory_plan_of_the_example_is_what_the_command_prints(tmp_path: Path) -> None:
    blocks = BLOCK.findall(DOCS.read_text())
    (place,) = [idx for idx, (_, text) in enumerate(blocks) if text.startswith("Memory plan of")]
    (_, make_config), (_, command), (_, documented) = blocks[place - 2 : place + 1]
    vmalloc = f'vmalloc() {{ {shlex.quote(sys.executable)} -m vmalloc.cli "$@"; }}'
    plan = subprocess.run(
        ["bash", "-euc", f"{vmalloc}\n{make_config}\n{command}"],
        cwd=tmp_path,
        env={**os.environ, "COLUMNS": "110", "PYTHONPATH": str(DOCS.parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert plan.returncode == 0, plan.stderr
    printed = plan.stdout[plan.stdout.rindex("Memory plan of") :]
    lines = "\n".join(line.rstrip() for line in printed.rstrip().splitlines())
    assert FREE_THEN.sub("", lines) == FREE_THEN.sub("", documented.rstrip())
