"""The examples of two sections of docs/swap-in.md run as they stand."""

import re
from pathlib import Path

import pytest

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "swap-in.md"


def examples(section):
    """Python blocks under the ``##`` heading."""
    text = GUIDE.read_text().split(f"\n## {section}\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


SECTIONS = ("vAttention's API", "An engine of your own")
EXAMPLES = [example for section in SECTIONS for example in examples(section)]


def test_there_are_examples():
    assert len(EXAMPLES) == 3


@pytest.mark.parametrize("example", EXAMPLES, ids=["vattention", "slots", "elastic"])
def test_example_runs(example):
    exec(compile(example, str(GUIDE), "exec"), {"__name__": "example"})


def test_files_that_the_guide_links_to_exist():
    for target in re.findall(r"\]\(([^)#:]+)\)", GUIDE.read_text()):
        assert (GUIDE.parent / target).exists(), target
