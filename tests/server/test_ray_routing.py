"""Who gets a request, by the keys of its prompt and by load; how many replicas there should be."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from vmalloc.server.ray.placement import Load, Placement
from vmalloc.server.ray.prefix_keys import BLOCK_BYTES, MAX_BLOCKS, prefix_keys
from vmalloc.server.ray.prefix_owners import PrefixOwners
from vmalloc.server.ray.scaling import PagePolicy

COMPLETIONS, CHAT, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"


def keys_of(path: str = COMPLETIONS, **body: Any) -> tuple[bytes, ...]:
    return prefix_keys(path, json.dumps(body).encode())


def shared(one: Sequence[bytes], other: Sequence[bytes]) -> int:
    """Leading keys that both have."""
    pairs = zip(one, other, strict=False)
    return next((idx for idx, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


class TestKeys:
    def test_there_is_one_for_each_full_block(self) -> None:
        text = "a" * (3 * BLOCK_BYTES + 5)
        assert len(keys_of(prompt=text)) == 3
        assert len(keys_of(prompt="a" * (BLOCK_BYTES - 1))) == 0
        assert len(keys_of(prompt="a" * (BLOCK_BYTES * (MAX_BLOCKS + 9)))) == MAX_BLOCKS

    def test_equal_beginnings_have_equal_keys_up_to_where_they_part(self) -> None:
        common = "".join(random.Random(0).choices("abcdef", k=4 * BLOCK_BYTES))
        one, other = keys_of(prompt=common + "x" * 500), keys_of(prompt=common + "y" * 500)
        assert shared(one, other) == 4
        assert len(set(one) | set(other)) == len(one) + len(other) - 4

    def test_a_key_stands_for_all_before_it(self) -> None:
        block = "z" * BLOCK_BYTES
        assert shared(keys_of(prompt="a" + block * 3), keys_of(prompt="b" + block * 3)) == 0

    def test_salt_model_and_endpoint_part_what_is_alike(self) -> None:
        text = "a" * 1000
        plain = keys_of(prompt=text, model="m")
        assert keys_of(prompt=text, model="m") == plain
        assert shared(plain, keys_of(prompt=text, model="m", cache_salt="tenant")) == 0
        assert shared(plain, keys_of(prompt=text, model="other")) == 0

    @pytest.mark.parametrize(("path", "name"), [(CHAT, "messages"), (RESPONSES, "input")])
    def test_a_chat_that_goes_on_keeps_its_keys(self, path: str, name: str) -> None:
        turns = [{"role": "user", "content": "tell me " * 60}]
        more = [*turns, {"role": "assistant", "content": "no"}]
        first, second = keys_of(path, **{name: turns}), keys_of(path, **{name: more})
        assert shared(first, second) >= len(first) - 1 > 0

    def test_token_ids_and_lists_of_prompts_have_keys(self) -> None:
        ids = list(range(400))
        assert keys_of(prompt=ids)
        assert keys_of(prompt=[ids, [1]]) == keys_of(prompt=ids)
        assert keys_of(prompt=["a" * 300, "b"]) == keys_of(prompt="a" * 300)

    @pytest.mark.parametrize(
        "body", [b"", b"{", b"[]", b"null", b'{"prompt": 3}', b'{"prompt": []}', b"[" * 100_000]
    )
    def test_what_has_no_text_has_no_keys(self, body: bytes) -> None:
        assert prefix_keys(COMPLETIONS, body) == ()

    def test_depth_at_the_limit_of_the_parser_is_no_error(self) -> None:
        """A body that can just be read has parts that cannot be written again."""
        for depth in range(800, 1100):
            body = b'{"messages": ' + b"[" * depth + b"]" * depth + b"}"
            assert isinstance(prefix_keys(CHAT, body), tuple)

    def test_other_paths_have_none(self) -> None:
        assert keys_of("/tokenize", prompt="a" * 1000) == ()


class TestOwners:
    def test_the_longest_beginning_counts(self) -> None:
        owners = PrefixOwners()
        owners.add([b"a", b"b", b"c"], "one")
        owners.add([b"a", b"b", b"x"], "two")
        assert owners.match([b"a", b"b", b"c", b"d"]) == {"one": 3, "two": 2}
        assert owners.match([b"b"]) == {"one": 1, "two": 1}
        assert owners.match([b"q"]) == owners.match([]) == {}

    def test_the_least_recently_used_keys_are_forgotten_tails_first(self) -> None:
        owners = PrefixOwners(max_keys=4)
        owners.add([b"a", b"b"], "one")
        owners.add([b"c", b"d"], "one")
        owners.add([b"a"], "one")
        owners.add([b"e"], "two")
        assert len(owners) == 4
        assert owners.match([b"a", b"b"]) == {"one": 1}
        assert owners.num_keys("one") == 3

    def test_a_replica_that_ended_is_forgotten(self) -> None:
        owners = PrefixOwners()
        owners.add([b"a", b"b"], "one")
        owners.add([b"a"], "two")
        owners.keep_only(["two"])
        assert owners.match([b"a", b"b"]) == {"two": 1}
        assert len(owners) == 1
        assert owners.num_keys("one") == 0


class TestPlacement:
    def test_who_has_the_longest_beginning_gets_it(self) -> None:
        placement = Placement("prefix", max_imbalance=8)
        loads = {"one": Load(num_requests=8), "two": Load()}
        assert placement.choose(loads, {"one": 5, "two": 2}) == "one"

    def test_unless_it_is_busier_than_that(self) -> None:
        placement = Placement("prefix", max_imbalance=8)
        loads = {"one": Load(num_requests=9), "two": Load()}
        assert placement.choose(loads, {"one": 5}) == "two"

    def test_unless_its_pages_are_full_and_others_are_not(self) -> None:
        placement = Placement("prefix", max_imbalance=8)
        full = Load(num_requests=1, page_usage=0.99, num_waiting=1)
        assert placement.choose({"one": full, "two": Load(num_requests=2)}, {"one": 5}) == "two"
        assert placement.choose({"one": full, "two": full}, {"one": 5}) == "one"
        idle = Load(num_requests=1, page_usage=0.99)
        assert placement.choose({"one": idle, "two": Load()}, {"one": 5}) == "one"

    def test_cold_prefixes_spread(self) -> None:
        placement, owners = Placement("prefix", max_imbalance=8), PrefixOwners()
        names = ["one", "two"]
        for family in range(10):
            keys = [f"{family}-{idx}".encode() for idx in range(5)]
            loads = {name: Load(num_prefixes=owners.num_keys(name)) for name in names}
            owners.add(keys, placement.choose(loads, owners.match(keys)))
        assert owners.num_keys("one") == owners.num_keys("two") == 25

    def test_of_many_the_less_busy_of_two_is_taken(self) -> None:
        placement = Placement("prefix", max_imbalance=8, seed=0)
        loads = {str(idx): Load(num_requests=idx) for idx in range(8)}
        chosen = [placement.choose(loads, {}) for _ in range(400)]
        assert "7" not in chosen
        assert len(set(chosen)) == 7

    def test_random_minds_nothing(self) -> None:
        placement = Placement("random", max_imbalance=8, seed=0)
        loads = {"one": Load(num_requests=100), "two": Load()}
        chosen = [placement.choose(loads, {"one": 5}) for _ in range(200)]
        assert 60 < chosen.count("one") < 140


class TestRouter:
    def test_long_answers_count_when_serve_has_forgotten_them(self) -> None:
        """Serve's count of what a replica was sent is dropped after ten seconds without news."""
        pytest.importorskip("ray.serve")  # which warns
        from ray.serve._private.common import (
            DeploymentHandleSource,
            DeploymentID,
            ReplicaID,
        )

        from vmalloc.server.ray.router import PrefixRouter

        deployment, now = DeploymentID("replica"), [0.0]
        router = PrefixRouter(
            deployment,
            DeploymentHandleSource.REPLICA,
            use_replica_queue_len_cache=True,
            get_curr_time_s=lambda: now[0],
        )
        router.initialize_state(routing="prefix", max_imbalance=8)
        busy, idle = ReplicaID("busy", deployment), ReplicaID("idle", deployment)
        candidates: list[Any] = [
            SimpleNamespace(replica_id=busy, routing_stats={"num_requests": 3}),
            SimpleNamespace(replica_id=idle, routing_stats={"num_requests": 0}),
        ]
        for _ in range(3):
            router.on_send_request(busy)
        for now[0] in [1.0] + 8 * [60.0]:  # equals are drawn
            (first, _) = asyncio.run(router.choose_replicas(candidates))
            assert [one.replica_id for one in first] == [idle]


class TestScaling:
    @pytest.mark.parametrize(
        ("num_replicas", "num_requests", "page_usage", "wanted"),
        [
            (1, 0, 0.0, 1),
            (1, 32, 0.5, 1),
            (1, 33, 0.5, 2),
            (2, 10, 1.6, 2),
            (2, 10, 1.9, 3),
            (4, 10, 0.4, 1),
            (3, 320, 0.1, 10),
        ],
    )
    def test_the_busier_signal_counts(
        self, num_replicas: int, num_requests: float, page_usage: float, wanted: int
    ) -> None:
        policy = PagePolicy(target_requests=32, target_page_usage=0.8)
        assert policy.wanted(num_replicas, num_requests, page_usage) == wanted

    def test_it_reads_what_replicas_record(self) -> None:
        policy = PagePolicy(target_requests=4, target_page_usage=0.8)
        metrics = {"num_requests": {"a": 6.0, "b": 3.0}, "page_usage": {"a": 0.1, "b": 0.1}}
        context = SimpleNamespace(
            aggregated_metrics=metrics, current_num_replicas=2, target_num_replicas=2
        )
        assert policy(context) == (3, {})
        silent = SimpleNamespace(
            aggregated_metrics={}, current_num_replicas=2, target_num_replicas=2
        )
        assert policy(silent) == (2, {})
