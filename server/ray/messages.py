"""What travels between the ingress and a replica.

Owns: nothing.  Thread-safety: plain values.
"""

from __future__ import annotations

from dataclasses import dataclass, field

Headers = tuple[tuple[bytes, bytes], ...]


@dataclass(frozen=True, slots=True)
class ReplicaRequest:
    """One HTTP request, body included, and what its routing needs.

    Attributes:
        keys: of its prompt's beginnings, see ``prefix_keys``.
        avoid: names of replicas that it should not go to, as they refused or lost it.
        routed: names of those that the router chose for it: the router, in the process of whoever
            sends it, adds them here.
    """

    method: str
    path: str
    query: bytes
    headers: Headers
    body: bytes
    scheme: str
    client: tuple[str, int] | None
    server: tuple[str, int | None] | None
    keys: tuple[bytes, ...] = ()
    avoid: frozenset[str] = frozenset()
    routed: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Accepted:
    """The first thing that comes back: who took up the request."""

    replica: str


@dataclass(frozen=True, slots=True)
class ReplyHead:
    """Status and headers of an answer; its body follows as bytes."""

    status: int
    headers: Headers


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole answer of one replica."""

    replica: str
    status: int
    headers: Headers
    body: bytes
