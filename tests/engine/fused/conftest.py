"""Models of known graphs, and a way to look at them as an engine does at load."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.engine.fused.models import Probed


@pytest.fixture
def probe() -> Iterator[Callable[[Any], Probed]]:
    """``probe(model)``: what the load probe learns, until the test ends."""
    lent: list[Probed] = []

    def lend(model: Any) -> Probed:
        lent.append(Probed(model))
        return lent[-1]

    yield lend
    for probed in lent:
        probed.give_back()
