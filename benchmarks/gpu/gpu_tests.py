"""Runs the project's tests that need a GPU, each suite in a process of its own.

result: ``suites`` {name: {passed, failed, skipped, seconds, returncode}}; ``failures`` [{suite,
test, message}]. The JUnit reports of all suites go to ``gpu_tests.xml`` beside the section's file.
A dry run collects the tests (``collected``) and runs none. Fails if a test does, or if none ran.

Warnings are no errors here: the machine's versions are not the ones that the suite is kept clean
for. Where pytest-xdist is there, a few processes share the GPU: most of the time goes into
compiling kernels. A suite whose time is up is interrupted, so that what it has run is reported.

Owns: the report.  Thread-safety: none; one process, one suite at a time.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .prepare import ROOT
from .section import Section, run_section

SUITES = {"tests/gpu": 0.75, "tests/kernels/on_device": 1.0}
"""Folders in order of importance, each with the share of the remaining time that it may take."""

MAX_FAILURES = 8
SECONDS_PER_TEST = 60
NUM_PROCESSES = 4
GRACE_SECONDS = 12.0
"""Of a suite's time, for the report of one that is interrupted: xdist gives its workers 10 s."""
STOPPED = 124  # as timeout(1) says it
NO_TESTS = 5  # pytest's exit status where nothing was collected


def main(section: Section) -> None:
    if section.dry_run:
        section.put("collected", collect(list(SUITES), section.left_s()))
        return
    reports: list[Path] = []
    for folder, share in SUITES.items():
        report = section.out.parent / f"{folder.replace('/', '_')}.xml"
        suites = section.result.get("suites", {})
        section.put(
            "suites", {**suites, folder: run_suite(folder, report, section.left_s() * share)}
        )
        if report.exists():
            reports.append(report)
            merge_reports(reports, section.out.parent / "gpu_tests.xml")
            section.put("failures", read_failures(reports))
    bad = [
        f"{name}: {one['passed']} passed, {one['failed']} failed, exit status {one['returncode']}"
        for name, one in section.result["suites"].items()
        if one["returncode"] != 0 or one["passed"] == 0
    ]
    if bad:
        raise RuntimeError("; ".join(bad))


def collect(folders: list[str], seconds: float) -> str:
    """See that every test file imports; pytest's last line."""
    returncode, text = _pytest([*folders, "--collect-only"], seconds=seconds)
    print(text, flush=True)
    if returncode not in (0, NO_TESTS):
        raise RuntimeError(f"collecting {', '.join(folders)} gave {returncode}")
    return text.strip().splitlines()[-1]


def run_suite(
    folder: str, report: Path, seconds: float, num_processes: int = NUM_PROCESSES
) -> dict[str, Any]:
    """One suite under its time limit; counts come from its report."""
    start = time.monotonic()
    arguments = [folder, f"--junitxml={report}", f"--maxfail={MAX_FAILURES}"]
    if find_spec("pytest_timeout") is not None:
        arguments.append(f"--timeout={SECONDS_PER_TEST}")
    if num_processes > 1 and find_spec("xdist") is not None:
        arguments += ["-n", str(num_processes)]
    returncode, text = _pytest(arguments, seconds=seconds)
    print(text, flush=True)
    counts = count_results(report) if report.exists() else {"passed": 0, "failed": 0, "skipped": 0}
    return {**counts, "seconds": round(time.monotonic() - start, 1), "returncode": returncode}


def count_results(report: Path) -> dict[str, int]:
    """Tests by how they ended; errors count as failures."""
    cases = list(ET.parse(report).iter("testcase"))
    failed = sum(
        case.find("failure") is not None or case.find("error") is not None for case in cases
    )
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {"passed": len(cases) - failed - skipped, "failed": failed, "skipped": skipped}


def read_failures(reports: list[Path]) -> list[dict[str, str]]:
    """What failed, and the first line of why."""
    failures = []
    for report in reports:
        for case in ET.parse(report).iter("testcase"):
            for problem in (*case.findall("failure"), *case.findall("error")):
                name = f"{case.get('classname')}::{case.get('name')}"
                message = (problem.get("message") or "").splitlines() or [""]
                failures.append({"suite": report.stem, "test": name, "message": message[0][:300]})
    return failures


def merge_reports(reports: list[Path], target: Path) -> None:
    """One JUnit file of all suites."""
    merged = ET.Element("testsuites")
    for report in reports:
        root = ET.parse(report).getroot()
        merged.extend([root] if root.tag == "testsuite" else list(root))
    ET.ElementTree(merged).write(target, encoding="utf-8", xml_declaration=True)


def _pytest(arguments: list[str], *, seconds: float) -> tuple[int, str]:
    """Exit status and output; ``STOPPED`` if its time was up."""
    command = [sys.executable, "-m", "pytest", "-q", "-W", "default", "-p", "no:cacheprovider"]
    process = subprocess.Popen(
        [*command, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    limit = max(5.0, seconds - GRACE_SECONDS)
    try:
        text, _ = process.communicate(timeout=limit)
        return process.returncode, text
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
    try:
        text, _ = process.communicate(timeout=GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        text, _ = process.communicate()
    return STOPPED, f"{text}\nstopped after {limit:.0f} s"


if __name__ == "__main__":
    run_section("tests", main)
