"""Puts the page maps of several replicas side by side, as if they were one.

Owns: nothing.  Thread-safety: pure functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Frame = dict[str, Any]

_SUMMED = ("shared_refs", "held_pages", "cached_pages", "num_slots")


def merge_frames(frames: Sequence[Frame]) -> Frame:
    """One frame: all slots, numbered on from replica to replica, and sums of all counts.

    Page sizes are those of the first; replicas of one application have the same.
    """
    first = frames[0]
    slots, num_slots = [], 0
    for frame in frames:
        slots += [
            {**slot, "slot_idx": slot["slot_idx"] + num_slots} for slot in frame["map"]["slots"]
        ]
        num_slots += frame["map"]["num_slots"]
    sums = {name: sum(frame["map"][name] for frame in frames) for name in _SUMMED}
    is_asleep = all(frame["map"]["is_asleep"] for frame in frames)
    totals = {name: sum(frame["totals"][name] for frame in frames) for name in first["totals"]}
    return {
        **first,
        "time": max(frame["time"] for frame in frames),
        "map": {**first["map"], **sums, "is_asleep": is_asleep, "slots": slots},
        "totals": totals,
    }
