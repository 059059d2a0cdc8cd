"""Makes a bare machine ready: prebuilt wheels unpacked, the extension built where it is imported
from.

No package is installed and nothing is fetched: wheels of ``.gpu/wheels`` go to ``build/gpu/site``,
which the orchestrator puts on ``PYTHONPATH``, and CMake builds ``_core`` into the tree. A wheel
that does not unpack is noted, and its section skips it. In a dry run nothing is built but the
stand-in libcuda; the extension must be there.

result: ``wheels`` {file: "ok" or why not}; ``build`` {seconds, library}; ``stand_in``: its path;
``imported``: where ``_core`` comes from.

Owns: ``build/gpu``.  Thread-safety: none; runs before the other sections.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from .section import Section, run_section

ROOT = Path(__file__).resolve().parents[2]
PREBUILT = ROOT / ".gpu"
SITE = ROOT / "build" / "gpu" / "site"
BUILD = ROOT / "build" / "gpu" / "cmake"
BUILD_TOOLS = ("cmake", "ninja", "pybind11")
RUN_TOOLS = ("torch", "transformers", "numpy", "pytest", "hypothesis", "rich", "typer")


def main(section: Section) -> None:
    missing = [name for name in RUN_TOOLS if find_spec(name) is None]
    if missing:
        raise RuntimeError(f"missing Python packages: {', '.join(missing)}")
    section.put("wheels", unpack_wheels(dry_run=section.dry_run))
    if section.dry_run:
        section.put("stand_in", build_stand_in())
    else:
        section.put("build", build_extension())
    section.put("imported", check_import())


def check_import() -> str:
    """Where ``_core`` comes from; RuntimeError if the library is another tree's, installed here."""
    script = "import vmalloc._core as c, vmalloc as v; print(v.__file__); print(c.__file__)"
    library, core = run([sys.executable, "-c", script]).splitlines()[-2:]
    if Path(library).resolve().parent != ROOT / "vmalloc":
        raise RuntimeError(f"vmalloc is imported from {library}, not from {ROOT}")
    return core


def unpack_wheels(*, dry_run: bool) -> dict[str, str]:
    """Unpack every wheel by itself, so that a bad one keeps no other away."""
    results = {}
    for wheel in sorted((PREBUILT / "wheels").glob("*.whl")):
        if dry_run:
            results[wheel.name] = "there; not unpacked in a dry run"
            continue
        flags = ["--no-index", "--no-deps", "--no-compile", "--upgrade", "--target", str(SITE)]
        command = [sys.executable, "-m", "pip", "install", "-q", *flags, str(wheel)]
        try:
            run(command)
            results[wheel.name] = "ok"
        except RuntimeError as error:
            results[wheel.name] = str(error)
            print(error, flush=True)
    return results


def build_extension() -> dict[str, object]:
    """Build ``_core`` with the Python that runs this, and put it beside the sources."""
    missing = [name for name in BUILD_TOOLS if find_spec(name) is None]
    if missing:
        raise RuntimeError(f"missing build tools: {', '.join(missing)}")
    import pybind11

    start = time.monotonic()
    cmake = [sys.executable, "-m", "cmake"]
    run(
        [
            *cmake,
            *("-S", str(ROOT), "-B", str(BUILD), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={find_ninja()}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]
    )
    run([*cmake, "--build", str(BUILD)])
    libraries = sorted(BUILD.glob("_core*.so"), key=os.path.getmtime)
    if not libraries:
        raise RuntimeError(f"no _core*.so in {BUILD} after the build")
    shutil.copy2(libraries[-1], ROOT / "vmalloc")
    return {"seconds": round(time.monotonic() - start, 1), "library": libraries[-1].name}


def find_ninja() -> str:
    """The program of the Python package, which may be beside Python and not on ``PATH``."""
    places = [str(Path(sys.executable).parent), sysconfig.get_path("scripts"), os.environ["PATH"]]
    found = shutil.which("ninja", path=os.pathsep.join(places))
    if found is None:
        raise RuntimeError(f"no program ninja in {os.pathsep.join(places)}")
    return found


def build_stand_in() -> str:
    """The stand-in libcuda that dry runs use."""
    from tests.fakecuda import library_path

    return str(library_path())


def run(command: Sequence[str]) -> str:
    """Run a command and return its output; RuntimeError with the end of it if it fails."""
    print("+", " ".join(command), flush=True)
    done = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode != 0:
        print(done.stdout, flush=True)
        tail = " | ".join(done.stdout.strip().splitlines()[-3:])
        raise RuntimeError(f"{Path(command[0]).name} gave {done.returncode}: {tail}")
    return done.stdout.strip()


if __name__ == "__main__":
    run_section("prepare", main)
