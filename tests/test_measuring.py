"""Where a result comes from is told truly, outside a checkout too."""

import shutil
import subprocess
import sys

import pytest

from vmalloc.measuring import provenance as module
from vmalloc.measuring.provenance import provenance, spread


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_repository_of_somebody_else_is_not_taken_for_ours(tmp_path, monkeypatch):
    """An installed package may stand in a virtual environment within another project."""
    identity = ("-c", "user.name=n", "-c", "user.email=e@example.com")
    for arguments in (("init", "-q"), (*identity, "commit", "-q", "--allow-empty", "-m", "m")):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "STAMP", tmp_path / "no-stamp")
    assert len(provenance(0)["commit"]) == 40
    inside = tmp_path / "site-packages"
    inside.mkdir()
    monkeypatch.setattr(module, "ROOT", inside)
    assert provenance(0)["commit"] == "unknown"
    assert provenance(0)["has_local_changes"] is False


@pytest.mark.parametrize(
    ("argv", "command"),
    [
        (["/a/bin/vmalloc", "ab", "--trace", "my file.csv"], "vmalloc ab --trace 'my file.csv'"),
        (["/a/vmalloc/cli.py", "ab"], "vmalloc ab"),
        ([str(module.ROOT / "benchmarks" / "waste.py"), "-x"], "python benchmarks/waste.py -x"),
        (["/somewhere/else.py"], "python else.py"),
    ],
)
def test_the_command_can_be_typed_again(argv, command, monkeypatch):
    monkeypatch.setattr(sys, "argv", argv)
    assert provenance(0)["command"] == command


def test_a_spread_is_the_median_with_the_ends():
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0}


def test_measuring_loads_neither_torch_nor_the_core():
    script = (
        "import sys, vmalloc.measuring.provenance, vmalloc.measuring.lengths;"
        "assert not {'torch', 'vmalloc._core'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
