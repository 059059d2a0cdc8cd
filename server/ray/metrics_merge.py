"""Puts the metrics of several replicas into one page, each sample with the name of its replica.

Owns: nothing.  Thread-safety: pure functions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_SAMPLE = re.compile(r"([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (.+)")


def merge_metrics(pages: Mapping[str, str]) -> str:
    """One page in Prometheus' text format, of one page for each replica by name.

    A metric's samples stand together, below its help and type, as the format wants it.
    """
    heads: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for replica, page in pages.items():
        name = ""
        for line in page.splitlines():
            if line.startswith("# "):
                _, _, name, *_ = line.split(" ", 3)
                head = heads.setdefault(name, [])
                if line not in head and not samples.get(name):
                    head.append(line)
            elif found := _SAMPLE.fullmatch(line):
                samples.setdefault(name, []).append(_labelled(found, replica))
                heads.setdefault(name, [])
    lines = [line for name in heads for line in (*heads[name], *samples.get(name, ()))]
    return "\n".join(lines) + "\n"


def _labelled(found: re.Match[str], replica: str) -> str:
    labels = f'{found[2]},replica="{replica}"' if found[2] else f'replica="{replica}"'
    return f"{found[1]}{{{labels}}} {found[3]}"
