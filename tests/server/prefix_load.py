"""A seeded load of prompts in families: those of one family begin alike."""

from __future__ import annotations

import random

NUM_FAMILIES = 10
NUM_REQUESTS = 200
PREFIX_WORDS = 470
_WORDS = ["def", "return", "self", "value", "index", "count", "text", "data", "open", "for"]


def family_prompts(seed: int) -> list[tuple[int, str]]:
    """(family, prompt) of each request, in the order that they are sent."""
    draw = random.Random(seed)
    prefixes = [" ".join(draw.choices(_WORDS, k=PREFIX_WORDS)) for _ in range(NUM_FAMILIES)]
    families = [idx % NUM_FAMILIES for idx in range(NUM_REQUESTS)]
    draw.shuffle(families)
    return [
        (family, f"{prefixes[family]} # {number} " + " ".join(draw.choices(_WORDS, k=6)))
        for number, family in enumerate(families)
    ]
