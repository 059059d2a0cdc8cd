"""Serve's door to our routing: asked for a replica, it applies the rule of ``placement``.

Owns: what it knows of prefixes.  Thread-safety: none; the event loop of one handle's router.

One lives in each process that has a handle: in each ingress. Serve copies this module there by
value, so it holds little; the rest is imported there.
"""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from .messages import ReplicaRequest
from .placement import Load, Placement
from .prefix_owners import PrefixOwners


class PrefixRouter(RequestRouter):  # type: ignore[misc]  # of a library without types
    """Routes a ``ReplicaRequest``, the first argument of a call, by its prefix; others by load."""

    def initialize_state(self, **kwargs: Any) -> None:
        """Serve gives the arguments of ``Placement``, as ``RequestRouterConfig`` has them."""
        self._owners = PrefixOwners()
        self._placement = Placement(**kwargs)

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """The one to take, then all others in case that it takes no more."""
        request = None if pending_request is None else next(iter(pending_request.args), None)
        keys: tuple[bytes, ...] = ()
        avoid: frozenset[str] = frozenset()
        if isinstance(request, ReplicaRequest):
            keys, avoid = request.keys, request.avoid
        by_name = {one.replica_id.unique_id: one for one in candidate_replicas}
        self._owners.keep_only(by_name)
        names = set(by_name) - avoid or set(by_name)
        if not names:
            return []
        matched = self._owners.match(keys)
        loads = {name: self._load(by_name[name]) for name in names}
        chosen = self._placement.choose(loads, {name: matched.get(name, 0) for name in names})
        self._owners.add(keys, chosen)
        if isinstance(request, ReplicaRequest):
            request.routed.append(chosen)
        others = [one for name, one in by_name.items() if name != chosen and name in names]
        return [[by_name[chosen]], others]

    def _load(self, replica: RunningReplica) -> Load:
        stats = replica.routing_stats or {}
        num_requests = self.replica_queue_len_cache.get(replica.replica_id)
        if num_requests is None:
            # Serve forgets its count after ten seconds without news, however long answers take.
            num_requests = stats.get("num_requests", 0)
        return Load(
            num_requests=num_requests,
            page_usage=stats.get("page_usage", 0.0),
            num_waiting=stats.get("num_waiting", 0),
            num_prefixes=self._owners.num_keys(replica.replica_id.unique_id),
        )
