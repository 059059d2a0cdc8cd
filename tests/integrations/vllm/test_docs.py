"""The example of docs/swap-in.md, ``## vLLM``, runs as it stands, but for the model's name."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def test_the_example_gives_its_memory_back(model_path, tmp_path):
    section = (ROOT / "docs" / "swap-in.md").read_text().split("\n## vLLM\n")[1].split("\n## ")[0]
    (example,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert example.count('"my/model"') == 1
    script = tmp_path / "example.py"
    script.write_text(example.replace('"my/model"', repr(str(model_path))))
    done = subprocess.run(
        [sys.executable, str(script)], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:]
    needed = re.search(r"([\d,]+) bytes of ([\d,]+) were needed", done.stdout)
    left = re.search(r"([\d,]+) bytes are left", done.stdout)
    needed, reserved, left = (
        int(text.replace(",", "")) for text in (*needed.groups(), left.group(1))
    )
    assert left < needed < 0.01 * reserved
    assert reserved == 1 << 30
