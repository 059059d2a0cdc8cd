"""What is left for KV on a GPU is arithmetic; the step that is measured for it runs anywhere."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from vmalloc.config import LayerKVSpec
from vmalloc.engine import EngineConfig
from vmalloc.engine.cache_factory import CacheFactory
from vmalloc.engine.cache_setup import resolve_config
from vmalloc.engine.device_memory import MemoryUse, kv_capacity, run_largest_step
from vmalloc.engine.devices import check_dtype, choose_device, module_device
from vmalloc.engine.model_loader import automatic_dtype
from vmalloc.engine.probe import probe_model
from vmalloc.errors import ConfigError

GIB = 2**30
H200 = MemoryUse(
    total_bytes=140 * GIB,
    other_bytes=1 * GIB,
    weight_bytes=15 * GIB,
    activation_bytes=2 * GIB,
    graph_bytes=1 * GIB,
)
CPU = torch.device("cpu")


def test_kv_gets_the_share_less_what_everything_else_takes() -> None:
    assert kv_capacity(H200, 0.9) == 126 * GIB - 19 * GIB
    assert kv_capacity(H200, 1.0) == 121 * GIB
    assert kv_capacity(replace(H200, graph_bytes=0), 0.5) == 52 * GIB
    # Whatever it is, all together stay within the share.
    for utilization in (0.2, 0.37, 0.9, 1.0):
        left = kv_capacity(H200, utilization)
        assert left + 19 * GIB <= 140 * GIB * utilization < left + 19 * GIB + 1


@pytest.mark.parametrize(
    ("use", "utilization"),
    [
        (H200, 0.1),
        (replace(H200, weight_bytes=139 * GIB), 0.9),
        (replace(H200, other_bytes=125 * GIB), 0.9),
        (MemoryUse(100, 10, 60, 20, 10), 1.0),  # exactly nothing
    ],
)
def test_where_nothing_is_left_every_part_is_named(use: MemoryUse, utilization: float) -> None:
    with pytest.raises(ConfigError) as caught:
        kv_capacity(use, utilization)
    text = str(caught.value)
    assert f"gpu_memory_utilization is {utilization}" in text
    for number in (
        *(use.total_bytes, use.other_bytes, use.weight_bytes),
        *(use.activation_bytes, use.graph_bytes),
    ):
        assert str(number) in text


LAYER = LayerKVSpec(num_kv_heads=2, k_head_dim=64, v_head_dim=64)  # 1,024 bytes a token


def test_the_cap_is_what_was_asked_for_else_what_is_left_at_most_what_sequences_can_use() -> None:
    def cap(device_limit: int | None, **settings: Any) -> int | None:
        config = EngineConfig(max_num_seqs=4, **settings)
        resolved = resolve_config(config, (LAYER,), 1000, torch.device("cuda:1"), device_limit)
        assert resolved.device == "cuda:1"
        assert resolved.swap_space_bytes is not None
        assert resolved.kv_cache_memory_bytes is not None
        assert resolved.swap_space_bytes <= resolved.kv_cache_memory_bytes
        return resolved.kv_cache_memory_bytes

    assert cap(None, kv_cache_memory_bytes=12345) == 12345
    assert cap(5 * 2**20) == 5 * 2**20
    # Full length for all, and two pages that are partly used in each.
    assert cap(80 * GIB) == 4 * (1000 * 1024 + 2 * 2 * 2**20)
    assert cap(80 * GIB, page_size=2**16) == 4 * (1000 * 1024 + 2 * 2**16)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mixtral"])
def test_the_largest_step_runs_beyond_the_context_and_needs_no_cache(
    name: str, tiny_model: Any
) -> None:
    model = copy.deepcopy(tiny_model(name))
    probe_model(model, CacheFactory(CPU))
    shapes = []
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda *args: shapes.append((*args[1][0].shape, *args[2].shape)))
    # More tokens than there are positions in the model.
    run_largest_step(model, num_tokens=400, num_seqs=16, max_model_len=160)
    hidden_size = head.weight.shape[1]
    assert shapes == [(1, 16, hidden_size, 1, 16, 97)]


def test_a_gpu_that_is_not_there_is_named() -> None:
    assert choose_device("cpu") == CPU
    with pytest.raises(ConfigError, match=r"device is 'cuda:4095'.*GPU"):
        choose_device("cuda:4095")


def test_auto_is_a_gpu_where_torch_has_one() -> None:
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_a_module_stays_on_its_one_device() -> None:
    module = torch.nn.Linear(2, 2)
    assert module_device(module, "auto") == module_device(module, "cpu") == CPU
    with pytest.raises(ConfigError, match=r"device is 'cuda:1'.*is on cpu"):
        module_device(module, "cuda:1")
    spread = torch.nn.Sequential(module, torch.nn.Linear(2, 2, device="meta"))
    with pytest.raises(ConfigError, match="spread over cpu, meta"):
        module_device(spread, "auto")
    with pytest.raises(ConfigError, match=r"model is on meta.*cpu and cuda"):
        module_device(spread[1], "auto")


def test_element_types_go_by_the_device() -> None:
    gpu = torch.device("cuda")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        check_dtype(dtype, gpu)
    with pytest.raises(ConfigError, match=r"'float16'; on cpu it must be one of float32, bfloat16"):
        check_dtype(torch.float16, CPU)
    with pytest.raises(ConfigError, match=r"'float64'; on cuda"):
        check_dtype(torch.float64, gpu)


@pytest.mark.parametrize(
    ("stored", "on_gpu"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.float32, torch.bfloat16),
        (None, torch.bfloat16),
    ],
)
def test_the_automatic_type_is_the_checkpoints_where_it_has_16_bits(
    stored: torch.dtype | None, on_gpu: torch.dtype, tiny_model: Any
) -> None:
    config = type(tiny_model("llama").config)(dtype=stored)
    assert automatic_dtype(config, torch.device("cuda:0")) == on_gpu
    assert automatic_dtype(config, CPU) == torch.float32
