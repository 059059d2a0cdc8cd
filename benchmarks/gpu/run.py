"""Runs the sections of the GPU benchmark one after the other and gathers what they measured.

``benchmarks/gpu/run.sh`` starts it. Files under ``$OUT`` (default ``benchmarks/results``; in a dry
run a temporary folder): ``gpu_results.json``, ``gpu_log.txt`` with all that the sections printed,
``gpu_tests.xml`` with the tests. The exit status is 1 if the build or the tests failed, in a dry
run if any section did; a section that fails never keeps the next from running.

``gpu_results.json``::

    schema      1
    dry_run     true: nothing in it was measured on a GPU
    provenance  commit, command, machine, versions, seed
    budget_s, wall_s
    sections    by name, in the order of ``plan.SECTIONS``
        status    "ok", "failed", "timed out", "skipped"
        reason    why, where it is not "ok"
        wall_s, limit_s
        driver    where pages came from: "cuda", "stand-in" (the strict stand-in libcuda of the
                  tests; never a measurement) or "none"
        result    what the section measured, as the head of its file says
        skipped   {what it left out: why}

Times carry their unit in the name; spreads are ``{median, p10, p90, min, max, n}``.

Owns: the sections' processes, and the files above.
Thread-safety: one process; in a dry run a thread waits for each child.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from vmalloc.measuring.provenance import provenance

from .child import run_child
from .plan import SECTIONS, TOTAL_SECONDS, Budget, SectionPlan, choose_sections
from .prepare import ROOT, SITE
from .summary import print_summary

SCHEMA = 1
PACKAGES = ("vmalloc", "torch", "triton", "transformers", "flash-attn", "flashinfer-python",
            "cuda-bindings", "cuda-core", "kvcached", "torch-memory-saver", "numpy")  # fmt: skip
ECHOED_LINES = 12
DRY_RUN_SECONDS = 240.0
DRY_RUN_ENV = {
    "CUDA_VISIBLE_DEVICES": "",
    "TRITON_INTERPRET": "1",
    "FAKECUDA_MEM_MB": "4096",
    "FAKECUDA_GRAN_KB": "64",
    "FAKECUDA_CTL": "query_runs=1",  # what is asked after is done, as on an idle GPU
    "OMP_NUM_THREADS": "1",
}


class Run:
    """One run: its settings, the results so far."""

    def __init__(self, *, out: Path, dry_run: bool, budget_s: float, seed: int) -> None:
        self._out = out
        self._dry_run = dry_run
        self._seed = seed
        self._budget = Budget(budget_s)
        self._start = time.monotonic()
        self._parts = Path(tempfile.mkdtemp(prefix="vmalloc-gpu-"))
        self._env = dict(os.environ)
        self._env["PYTHONPATH"] = os.pathsep.join(
            [self._env.get("PYTHONPATH", str(ROOT)), str(SITE)]
        )
        out.mkdir(parents=True, exist_ok=True)
        (out / "gpu_log.txt").write_bytes(b"")
        self.results: dict[str, Any] = {
            "schema": SCHEMA,
            "dry_run": dry_run,
            "provenance": provenance(seed, PACKAGES),
            "budget_s": budget_s,
            "wall_s": 0.0,
            "sections": {},
        }

    def run_all(self, plans: Sequence[SectionPlan]) -> None:
        """``prepare``, then the rest: one at a time, in a dry run one a core."""
        self._run_one(plans[0], plans[1:])
        if self._dry_run:
            self._use_stand_in()
            with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
                list(pool.map(self._run_one, plans[1:]))
        else:
            for idx, plan in enumerate(plans[1:], start=2):
                self._run_one(plan, plans[idx:])
        shutil.rmtree(self._parts, ignore_errors=True)

    def _use_stand_in(self) -> None:
        """Let the sections find the stand-in libcuda, no GPU, and Triton's interpreter."""
        self._env |= DRY_RUN_ENV
        library = self.results["sections"]["prepare"]["result"].get("stand_in")
        if library:
            self._env["VMALLOC_LIBCUDA"] = library
            folders = [str(Path(library).parent), self._env.get("LD_LIBRARY_PATH", "")]
            self._env["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, folders))

    def _run_one(self, plan: SectionPlan, later: Sequence[SectionPlan] = ()) -> None:
        granted = DRY_RUN_SECONDS if self._dry_run else self._budget.grant_s(plan, later)
        if granted is None:
            reason = f"{self._budget.left_s():.0f} s left of {self.results['budget_s']:.0f}"
            self._note(plan, {"status": "skipped", "reason": reason, "wall_s": 0.0})
            return
        part, log = self._parts / f"gpu_{plan.name}.json", self._parts / f"{plan.name}.log"
        command = [sys.executable, "-m", f"{__package__}.{plan.module}", "--out", str(part)]
        # It stops by itself a little before it is stopped.
        command += ["--seconds", f"{max(granted - 4, granted / 2):.0f}", "--seed", str(self._seed)]
        command += ["--dry-run"] if self._dry_run else []
        ending = run_child(command, env=self._env, cwd=ROOT, limit_s=granted, log=log)
        entry: dict[str, Any] = {
            "status": "ok",
            "wall_s": round(ending.wall_s, 1),
            "limit_s": round(granted, 1),
        }
        entry.update(json.loads(part.read_text()) if part.exists() else {"result": {}})
        error = entry.pop("error", None)
        if ending.returncode is None:
            entry.update(status="timed out", reason=f"stopped after {granted:.0f} s")
        elif ending.returncode != 0:
            reason = error or f"exit status {ending.returncode}"
            entry.update(status="failed", reason=reason)
        self._note(plan, entry, log)

    def _note(self, plan: SectionPlan, entry: dict[str, Any], log: Path | None = None) -> None:
        """Keep a section's results, and write all of them: the next one may be the last."""
        text = log.read_text(errors="replace") if log is not None and log.exists() else ""
        with (self._out / "gpu_log.txt").open("a") as output:
            output.write(f"==== {plan.name}: {entry['status']}, {entry['wall_s']} s\n{text}\n")
        xml = self._parts / "gpu_tests.xml"
        if xml.exists():
            shutil.copy2(xml, self._out / xml.name)
        sections = self.results["sections"] | {plan.name: entry}
        order = [one.name for one in SECTIONS if one.name in sections]
        self.results["sections"] = {name: sections[name] for name in order}
        self.results["wall_s"] = round(time.monotonic() - self._start, 1)
        part = self._out / "gpu_results.json.part"
        part.write_text(json.dumps(self.results, indent=1) + "\n")
        os.replace(part, self._out / "gpu_results.json")
        reason = f": {entry['reason']}" if "reason" in entry else ""
        print(f"{plan.name:14} {entry['status']:9} {entry['wall_s']:6.1f} s{reason}", flush=True)
        if entry["status"] in ("failed", "timed out"):
            for line in text.strip().splitlines()[-ECHOED_LINES:]:
                print(f"  | {line}", flush=True)

    def exit_status(self) -> int:
        """1 if what must pass did not."""
        bad = [
            plan.name
            for plan in SECTIONS
            if (plan.is_required or self._dry_run)
            and self.results["sections"].get(plan.name, {}).get("status", "ok") != "ok"
        ]
        return 1 if bad else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; the exit status."""
    given = _parse(arguments)
    try:
        plans = choose_sections(given.sections)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    default = tempfile.mkdtemp(prefix="vmalloc-gpu-out-") if given.dry_run else "benchmarks/results"
    out = Path(os.environ.get("OUT") or default)
    run = Run(
        out=out if out.is_absolute() else ROOT / out,
        dry_run=given.dry_run,
        budget_s=given.budget,
        seed=given.seed,
    )
    run.run_all(plans)
    print_summary(run.results)
    status = run.exit_status()
    if given.dry_run:
        print(f"dry run: {'ok' if status == 0 else 'failed'} ({run.results['wall_s']:.0f} s)")
    return status


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    sections = "\n".join(f"  {plan.name:14} {plan.what}" for plan in SECTIONS)
    parser = argparse.ArgumentParser(
        prog="benchmarks/gpu/run.sh",
        description="Build, test and measure on a machine with a GPU.",
        epilog=f"sections, in order of importance:\n{sections}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--dry-run", action="store_true", help="check all of it without a GPU")
    parser.add_argument("--sections", metavar="A,B", help="only these, and prepare")
    parser.add_argument(
        "--budget", type=float, default=TOTAL_SECONDS, metavar="SECONDS", help="for everything"
    )
    parser.add_argument("--seed", type=int, default=0, help="of lengths, weights and prompts")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
