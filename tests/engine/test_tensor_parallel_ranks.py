"""The processes of tensor parallelism: how they start, agree and talk. All of them are real."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.engine.ranks import LIMIT_S, footprint, listeners, order, pids_of, start
from vmalloc.engine import ConfigError
from vmalloc.engine.errors import RankMismatchError
from vmalloc.engine.tensor_parallel.agreement import agree, find_differences
from vmalloc.engine.tensor_parallel.rank_channel import (
    FRAME_BYTES,
    INT64_MAX,
    INT64_MIN,
    MAX_VOTES,
)
from vmalloc.engine.tensor_parallel.rank_environment import rank_environment
from vmalloc.engine.tensor_parallel.rank_group import RankGroup
from vmalloc.engine.tensor_parallel.rank_join import host_store
from vmalloc.errors import InvariantError


@pytest.fixture(scope="module")
def group() -> Iterator[RankGroup]:
    """Three ranks that do what they are told."""
    with start(3) as one:
        yield one


class TestChannel:
    @pytest.mark.parametrize(
        "num_bytes", [0, 1, FRAME_BYTES - 20, FRAME_BYTES, FRAME_BYTES + 1, 3_000_000]
    )
    def test_messages_of_any_length_arrive(self, group: RankGroup, num_bytes: int) -> None:
        text = ("0123456789" * (num_bytes // 10 + 1))[:num_bytes]
        order(group, "echo", text)
        answers = group.channel.gather(b"0")
        assert answers == [b"0", f"1{text}".encode(), f"2{text}".encode()]

    def test_the_least_of_the_votes_is_known_everywhere(self, group: RankGroup) -> None:
        order(group, "vote", [[5, INT64_MIN, 7, 0], [4, 3, 9, 1]])
        least = [4, INT64_MIN, 6, 0]
        assert group.channel.least([6, INT64_MAX, 6, 2]) == least
        assert [json.loads(text) for text in group.channel.gather(b"[]")[1:]] == [least, least]

    def test_a_vote_may_have_no_or_many_values(self, group: RankGroup) -> None:
        for num_values in (0, MAX_VOTES):
            order(group, "vote", [[2] * num_values, [1] * num_values])
            assert group.channel.least([3] * num_values) == [1] * num_values
            group.channel.gather(b"")

    def test_different_numbers_of_votes_are_refused_in_all_ranks(self, group: RankGroup) -> None:
        order(group, "vote", [[1, 2], [1]])
        with pytest.raises(RankMismatchError, match=r"0 gave 2 .* rank 1 gave 2, rank 2 gave 1"):
            group.channel.least([1, 2])
        first, second = group.channel.gather(b"")[1:]
        assert b"rank 1 gave 2 values" in first
        assert b"rank 2 gave 1 values" in second

    def test_a_vote_that_cannot_travel_is_named(self, group: RankGroup) -> None:
        with pytest.raises(ConfigError, match=f"{INT64_MAX + 1} must be between"):
            group.channel.least([INT64_MAX + 1])
        with pytest.raises(ConfigError, match=f"{MAX_VOTES + 1} values .* at most {MAX_VOTES}"):
            group.channel.least([0] * (MAX_VOTES + 1))

    def test_messages_go_from_rank_0(self, group: RankGroup) -> None:
        with pytest.raises(InvariantError, match="rank 0 cannot do this"):
            group.channel.receive()

    def test_the_models_collectives_have_their_own_group(self, group: RankGroup) -> None:
        order(group, "sum", 1)
        tensor = torch.ones(3)
        dist.all_reduce(tensor)
        assert tensor.tolist() == [3.0, 3.0, 3.0]


class TestAgreement:
    def test_ranks_with_equal_facts_agree(self, group: RankGroup) -> None:
        facts = {"torch": torch.__version__, "layers": 3, "ratio": 0.5, "tied": None}
        order(group, "agree", [facts, facts])
        agree(group.channel, facts)
        assert group.channel.gather(b"")[1:] == [b"agreed", b"agreed"]

    def test_a_difference_is_named_in_all_ranks(self, group: RankGroup) -> None:
        order(group, "agree", [{"layers": 3, "dtype": "float32"}, {"layers": 4, "dtype": "bf16"}])
        expected = "layers is 3 on ranks 0, 1 and 4 on rank 2"
        with pytest.raises(RankMismatchError, match=expected) as caught:
            agree(group.channel, {"layers": 3, "dtype": "float32"})
        assert caught.value.fact == "layers"
        assert isinstance(caught.value, ConfigError)
        assert "dtype is 'float32' on ranks 0, 1 and 'bf16' on rank 2" in str(caught.value)
        for text in group.channel.gather(b"")[1:]:
            assert text.decode() == f"layers|{caught.value}"

    def test_a_missing_fact_and_another_type_are_differences(self) -> None:
        assert find_differences([{"a": 1}, {}]) == [("a", "1 on rank 0 and nothing on rank 1")]
        assert find_differences([{"a": 1}, {"a": "1"}]) == [("a", "1 on rank 0 and '1' on rank 1")]
        assert find_differences([{"a": True}, {"a": True}]) == []


class TestProcesses:
    def test_a_rank_is_set_up_for_its_share_of_the_host(self, group: RankGroup) -> None:
        order(group, "describe")
        answers = [json.loads(text) for text in group.channel.gather(b"null")[1:]]
        for rank, said in enumerate(answers, start=1):
            assert said["rank"] == [str(rank), str(rank), "3"]
            assert said["threads"] == torch.get_num_threads()
            assert said["spin"] == os.environ.get("GOMP_SPINCOUNT", "0")
            assert said["session"] == pids_of(group)[rank] != os.getsid(0)
            assert said["ignores_interrupt"]
            assert said["device"] == "cpu"

    def test_nothing_listens_beyond_this_host(self, group: RankGroup) -> None:
        loopback = "0100007F"  # 127.0.0.1 as the kernel writes it
        for pid in (os.getpid(), *pids_of(group).values()):
            addresses = listeners(pid)
            assert addresses
            assert set(addresses) == {loopback}

    def test_a_process_has_one_group(self, group: RankGroup) -> None:
        with pytest.raises(ConfigError, match=r"initialised in this process already.*world size 3"):
            start(2)
        group.check()


class TestSettings:
    def test_a_taken_port_is_named(self) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            before = footprint()
            with pytest.raises(ConfigError, match=f"tensor_parallel_port is {port}.*in use"):
                host_store(port, LIMIT_S)
            assert footprint() == before

    @pytest.mark.parametrize(
        ("settings", "text"),
        [
            ({"size": 1}, "1 ranks; it must have between 2 and"),
            ({"size": 4_000}, "4000 ranks; it must have between 2 and"),
            ({"entry": "module"}, "entry is 'module'"),
            ({"port": 70_000}, "70000; it must be between 1 and 65535"),
            ({"timeout_s": 0.0}, "0.0; it must be above 0"),
            ({"device": "cuda:1"}, "'cuda:1' with tensor_parallel_size 2; it must be cpu or cuda"),
        ],
    )
    def test_what_can_never_work_is_refused(self, settings: dict[str, Any], text: str) -> None:
        with pytest.raises(ConfigError, match=text):
            RankGroup.start(**{"size": 2, "device": "cpu", **settings})

    def test_more_ranks_than_gpus_are_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        with pytest.raises(ConfigError, match="is 3; it must be at most the number of GPUs, 2"):
            RankGroup.start(3, device="cuda")

    def test_the_environment_is_put_back(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("RANK", "theirs")
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        before = dict(os.environ)
        with rank_environment(1, 4, 1234):
            assert os.environ["RANK"] == os.environ["LOCAL_RANK"] == "1"
            assert os.environ["WORLD_SIZE"] == "4"
            assert os.environ["MASTER_PORT"] == "1234"
        assert dict(os.environ) == before
