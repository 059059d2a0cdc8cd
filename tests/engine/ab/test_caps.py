"""Caps limit batches, and hold the largest request all the same."""

import pytest

from vmalloc import KVCacheConfig, LayerKVSpec, create_kv_backend
from vmalloc.engine import ConfigError
from vmalloc.engine.ab.arms import ARMS, choose_arms
from vmalloc.engine.ab.caps import choose_cap, distinct_prompt_tokens
from vmalloc.engine.ab.workload import Workload, WorkloadRequest, make_workload

PROMPT = tuple(range(1, 41))
PAGE = 64 << 10


@pytest.fixture
def backend():
    config = KVCacheConfig(
        layers=(LayerKVSpec(num_kv_heads=2, k_head_dim=64, v_head_dim=64),) * 4,  # 4 KiB a token
        max_num_seqs=8,
        max_seq_len=2048,
        capacity_bytes=64 << 20,
        driver="null",
        page_bytes=PAGE,
    )
    with create_kv_backend(config, "virtual") as backend:
        yield backend


def test_equal_beginnings_count_once_by_16_tokens():
    requests = (
        WorkloadRequest(0.0, PROMPT, 5),
        WorkloadRequest(0.0, PROMPT, 5, "sample", 4),  # all of its prompt is there
        WorkloadRequest(0.0, (*PROMPT[:20], 99), 5),  # only its first 16 are
        WorkloadRequest(0.0, PROMPT[16:], 5),  # the same tokens, but not at the beginning
    )
    assert distinct_prompt_tokens(Workload("", "", requests)) == 40 + 0 + 5 + 24


def test_a_cap_is_half_of_the_demand_in_whole_pages(backend):
    workload = make_workload("offline", vocab_size=512, context_tokens=1024)
    cap = choose_cap(workload, backend, None)
    # 16 tokens a page; each completion has a page more for its last tokens, and one to copy.
    num_pages = [-(-one.num_output_tokens // 16) + 2 for one in workload.requests]
    prompt_bytes = 4096 * sum(len(one.prompt_token_ids) for one in workload.requests)
    assert cap.demand_bytes == prompt_bytes + PAGE * sum(num_pages)
    assert cap.num_bytes == -(-cap.demand_bytes // 2 // PAGE) * PAGE
    assert cap.words == "50% of what all requests would hold at once"


def test_a_cap_holds_two_of_the_largest_request(backend):
    request = WorkloadRequest(0.0, PROMPT[:32], 24, "beam", 4)  # 2 pages, and 4 of each beam
    cap = choose_cap(Workload("alone", "", (request,)), backend, None)
    assert cap.num_bytes == 2 * (2 + 4 * 4) * PAGE
    assert cap.words == "200% of what all requests would hold at once"


def test_bursts_have_room_for_all(backend):
    workload = make_workload("bursty", vocab_size=512, context_tokens=1024)
    cap = choose_cap(workload, backend, None)
    assert cap.num_bytes >= 1.5 * cap.demand_bytes
    assert cap.words.endswith("room for all")


def test_what_is_asked_for_is_the_cap(backend):
    workload = make_workload("offline", vocab_size=512, context_tokens=1024)
    assert choose_cap(workload, backend, 12345).num_bytes == 12345


def test_arms_are_chosen_by_name_and_refused_by_name():
    assert [arm.name for arm in choose_arms(["paged", "oracle"])] == ["paged", "oracle"]
    assert set(ARMS) == {"virtual", "paged", "max_length", "power_of_two", "oracle"}
    for names, words in (
        (["virtual", "pagd"], "backends has 'pagd'"),
        (["virtual", "virtual"], "each can be named once"),
        (["virtual"], "needs at least 2"),
    ):
        with pytest.raises(ConfigError, match=words):
            choose_arms(names)
