"""Break the source on purpose, one named way at a time, and see that a named test goes red.

Owns: a scratch copy of the tree under ``build/mutations``.  Thread-safety: none; one process.

A test that stays green when copy-on-write, the fence or a reference count is gone proves nothing.
The working tree itself is only read. Mutations of the C++ core are built in the scratch copy.

    python scripts/mutations.py                  # all of scripts/mutation_list.py
    python scripts/mutations.py --only paged   # those whose name has the word
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))

from mutation_list import MUTATIONS, Edit, Mutation

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("CMakeLists.txt", "pyproject.toml", "csrc", "vmalloc", "engine", "server", "tests")
SKIPPED = ("__pycache__", "*.so")
TEST_SECONDS = 300
BUILD_SECONDS = 900

# The scratch copy must win over an editable install, whose import hook comes before sys.path.
RUN_PYTEST = """
import os, sys
sys.meta_path[:] = [h for h in sys.meta_path if not type(h).__module__.startswith("_editable")]
sys.path.insert(0, os.getcwd())
import vmalloc
assert vmalloc.__file__.startswith(os.getcwd()), vmalloc.__file__
import pytest
sys.exit(pytest.main(["-x", "-q", "--no-header", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""

console = Console(highlight=False)


@dataclass(frozen=True)
class Verdict:
    """How a mutation ended.

    Attributes:
        is_noticed: whether its test went red.
        what: the way it did, or what went wrong.
    """

    is_noticed: bool
    what: str
    seconds: float = 0.0


class Scratch:
    """A copy of the tree that can be broken, built and tested."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._build = folder / "build"
        self._intact = folder / "intact"
        for name in COPIED:
            _copy_changed(ROOT / name, folder / name)

    def build(self) -> str | None:
        """Bring the core up to date; the compiler's words if that failed."""
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        cmake, ninja = (shutil.which(tool, path=path) for tool in ("cmake", "ninja"))
        if cmake is None or ninja is None:
            return "cmake and ninja are needed; `make build` installs them"
        if not (self._build / "build.ninja").exists():
            command = [sys.executable, "-m", "pybind11", "--cmakedir"]
            pybind11 = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            settings = {
                "CMAKE_MAKE_PROGRAM": ninja,
                "Python_EXECUTABLE": sys.executable,
                "pybind11_DIR": pybind11.strip(),
                # Every mutation links once: without link-time optimisation that takes a second.
                "CMAKE_INTERPROCEDURAL_OPTIMIZATION": "OFF",
            }
            arguments = [f"-D{name}={value}" for name, value in settings.items()]
            failure = self._call(
                [cmake, "-S", ".", "-B", "build", "-G", "Ninja", *arguments], BUILD_SECONDS
            )
            if failure.returncode:
                return failure.stdout
        built = self._call([cmake, "--build", "build"], BUILD_SECONDS)
        if built.returncode:
            return built.stdout
        for library in self._build.glob("_core*.so"):
            shutil.copy2(library, self.folder / "vmalloc" / library.name)
        return None

    def keep_core(self) -> None:
        """Remember the core as it is now, for ``restore``."""
        self._intact.mkdir(exist_ok=True)
        for library in self._build.glob("_core*.so"):
            shutil.copy2(library, self._intact / library.name)

    def test(self, *names: str) -> subprocess.CompletedProcess[str]:
        """Run tests."""
        return self._call([sys.executable, "-c", RUN_PYTEST, *names], TEST_SECONDS)

    def apply(self, edits: tuple[Edit, ...]) -> None:
        """Make the edits."""
        for edit in edits:
            path = self.folder / edit.path
            text = path.read_text()
            if text.count(edit.old) != 1:
                raise ValueError(f"{edit.path} does not hold this once: {edit.old!r}")
            path.write_text(text.replace(edit.old, edit.new))

    def restore(self, edits: tuple[Edit, ...]) -> None:
        """Undo the edits; the next test must not run on a core that was built with them.

        The files become newer, so the next build builds them again.
        """
        for edit in edits:
            (self.folder / edit.path).write_text((ROOT / edit.path).read_text())
        for library in self._intact.glob("_core*.so"):
            shutil.copy2(library, self.folder / "vmalloc" / library.name)

    def _call(self, command: list[str], timeout: float) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"GOMP_SPINCOUNT": "0", "HF_HUB_OFFLINE": "1"}
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        return subprocess.run(
            command,
            cwd=self.folder,
            env=environment,
            timeout=timeout,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )


def judge(scratch: Scratch, mutation: Mutation) -> Verdict:
    """Break, build, test, and mend again."""
    started = time.monotonic()
    try:
        scratch.apply(mutation.edits)
        if mutation.is_native and (failure := scratch.build()) is not None:
            return Verdict(False, "does not build: " + failure.strip().splitlines()[-1])
        is_noticed, what = _read(scratch.test(mutation.test))
    except ValueError as error:
        is_noticed, what = False, str(error)
    except subprocess.TimeoutExpired as error:
        is_noticed, what = False, f"no answer in {error.timeout:.0f} s"
    finally:
        scratch.restore(mutation.edits)
    return Verdict(is_noticed, what, time.monotonic() - started)


def _read(result: subprocess.CompletedProcess[str]) -> tuple[bool, str]:
    if result.returncode == 0:
        return False, "SURVIVED"
    if result.returncode < 0:
        return True, f"ends with signal {-result.returncode}"
    if result.returncode == 1:
        lines = re.findall(r"^E +(\S.*)$", result.stdout, re.MULTILINE)
        return True, lines[0] if lines else "fails"
    return False, "the test does not run: " + result.stdout.strip().splitlines()[-1]


def _copy_changed(source: Path, target: Path) -> None:
    """Copy a file or folder; files that are the same keep their time, so nothing is built twice."""
    if source.is_symlink():
        if not target.is_symlink():
            target.symlink_to(source.readlink())
    elif source.is_dir():
        target.mkdir(parents=True, exist_ok=True)
        names = {path.name for path in source.iterdir() if not any(map(path.match, SKIPPED))}
        for old in target.iterdir():
            if old.name not in names and not any(map(old.match, SKIPPED)):
                shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
        for name in names:
            _copy_changed(source / name, target / name)
    elif not target.exists() or target.read_bytes() != source.read_bytes():
        shutil.copyfile(source, target)


def _show(verdicts: dict[Mutation, Verdict]) -> None:
    table = Table(title="Mutations and the tests that notice them")
    for column in ("mutation", "test", "goes red with", "s"):
        table.add_column(column, overflow="fold")
    for mutation, verdict in verdicts.items():
        style = "" if verdict.is_noticed else "bold red"
        cells = (mutation.name, mutation.test.split("/")[-1], verdict.what[:90])
        seconds = f"{verdict.seconds:.0f}"
        table.add_row(*map(escape, cells), seconds, style=style)  # test names have brackets
    console.print(table)


def main(
    only: Annotated[str, typer.Option(help="Only mutations whose name has this in it.")] = "",
    folder: Annotated[Path, typer.Option(help="Where the scratch copy goes.")] = ROOT
    / "build"
    / "mutations",
) -> None:
    """Run the mutations; exit 1 if a test did not notice one."""
    chosen = [mutation for mutation in MUTATIONS if only in mutation.name]
    folder.mkdir(parents=True, exist_ok=True)
    scratch = Scratch(folder.resolve())
    verdicts: dict[Mutation, Verdict] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task("building and testing the source as it is", total=len(chosen) + 1)
        failure = scratch.build()
        if failure is None:
            result = scratch.test(*dict.fromkeys(mutation.test for mutation in chosen))
            failure = result.stdout if result.returncode else None
        if failure is not None:
            console.print(failure, markup=False)
            console.print("The source as it is does not build, or its tests fail.")
            raise typer.Exit(2)
        scratch.keep_core()
        progress.advance(task)
        for mutation in chosen:
            progress.update(task, description=mutation.name)
            verdicts[mutation] = judge(scratch, mutation)
            if not verdicts[mutation].is_noticed:
                console.print(f"{mutation.name}: {verdicts[mutation].what}", markup=False)
            progress.advance(task)
    _show(verdicts)
    num_left = sum(not verdict.is_noticed for verdict in verdicts.values())
    console.print(f"{len(verdicts) - num_left} of {len(verdicts)} mutations were noticed.")
    raise typer.Exit(1 if num_left else 0)


if __name__ == "__main__":
    typer.run(main)
