"""What is special about caches on a CUDA device, over the stand-in driver where it needs one."""

import pytest
import torch

from tests import fakecuda
from vmalloc import (
    ConfigError,
    KVBatchBuffers,
    KVCacheConfig,
    LayerKVSpec,
    SequenceGroupSpec,
    choose_backend,
    create_kv_backend,
)
from vmalloc.device import current_stream, tensor_device

from .backends import BASES, Engine, stand_in_driver

LAYER = LayerKVSpec(num_kv_heads=2, k_head_dim=16, v_head_dim=16)
NO_LIBRARY = "no/such/libcuda.so.1"
has_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")


@pytest.fixture(autouse=True)
def stand_in():
    """The stand-in driver, for every test here."""
    with stand_in_driver() as fake:
        yield fake


def make_config(**changes):
    settings = {"layers": (LAYER,), "max_num_seqs": 2, "max_seq_len": 64, "capacity_bytes": 1 << 20}
    return KVCacheConfig(**{**settings, **changes})


# What a config may say


@pytest.mark.parametrize("device", ["cpu:0", "cuda:", "cuda:-1", "cuda:x", "gpu", "", "CUDA", 0])
def test_devices_that_there_are_not_are_named(device):
    with pytest.raises(ConfigError, match=f"device is {device!r}; supported: cpu, cuda, cuda:N"):
        make_config(device=device)


def test_drivers_that_there_are_not_are_named():
    with pytest.raises(ConfigError, match="driver is 'rocm'; supported: auto, host, cuda, null"):
        make_config(driver="rocm")
    with pytest.raises(ConfigError, match="driver is 'host' and device 'cuda:1'"):
        make_config(driver="host", device="cuda:1")


@pytest.mark.parametrize(
    ("device", "driver", "resolved", "index"),
    [
        ("cpu", "auto", "host", 0),
        ("cuda", "auto", "cuda", 0),
        ("cuda:3", "auto", "cuda", 3),
        ("cuda:10", "cuda", "cuda", 10),
        ("cpu", "cuda", "cuda", 0),
        ("cuda", "null", "null", 0),
    ],
)
def test_the_driver_follows_the_device(device, driver, resolved, index):
    config = make_config(device=device, driver=driver)
    assert config.driver_name == resolved
    assert config.device_idx == index


# What auto picks, and why


def test_auto_is_virtual_where_the_driver_is_there():
    choice = choose_backend("auto", "cuda")
    assert (choice.kind, choice.driver) == ("virtual", "cuda")
    choice = choose_backend("paged", "cuda")
    assert (choice.kind, choice.driver) == ("paged", "torch")
    assert choice.reason.startswith("asked for; ")


def test_auto_is_paged_where_it_is_not_and_says_why(monkeypatch):
    monkeypatch.setenv("VMALLOC_LIBCUDA", NO_LIBRARY)
    choice = choose_backend("auto", "cuda")
    assert (choice.kind, choice.driver) == ("paged", "torch")
    assert NO_LIBRARY in choice.reason
    # What is asked for by name is not replaced.
    assert choose_backend("virtual", "cuda").kind == "virtual"
    assert choose_backend("auto", "cuda", "cuda").kind == "virtual"
    assert choose_backend("auto", "cpu").driver == "host"


@pytest.mark.parametrize(("mode", "words"), [("vmm=0", "no virtual memory"), ("devices=0", "sees")])
def test_a_device_without_virtual_memory_is_a_reason(stand_in, mode, words):
    stand_in.ctl(mode)
    choice = choose_backend("auto", "cuda:0")
    assert choice.kind == "paged"
    assert words in choice.reason


def test_a_device_that_does_not_exist_is_a_reason():
    assert "there are 1" in choose_backend("auto", "cuda:1").reason


def test_a_missing_driver_is_named_when_the_cache_is_made(monkeypatch):
    monkeypatch.setenv("VMALLOC_LIBCUDA", NO_LIBRARY)
    with pytest.raises(ConfigError, match=NO_LIBRARY):
        create_kv_backend(make_config(driver="cuda"), "virtual")


@has_no_gpu
@pytest.mark.parametrize("kind", ["virtual", "paged"])
def test_a_device_that_torch_does_not_see_is_named(kind):
    with pytest.raises(ConfigError, match=r"device is 'cuda'; torch .* sees 0 CUDA devices"):
        create_kv_backend(make_config(device="cuda"), kind)
    with pytest.raises(ConfigError, match="sees 0 CUDA devices"):
        tensor_device("cuda:0")
    assert current_stream(tensor_device("cpu")) == 0


# Pages and steps


def test_pages_are_the_granularity_unless_told_otherwise(stand_in):
    assert create_kv_backend(make_config(driver="cuda")).stats().page_bytes == 4096
    cache = create_kv_backend(make_config(driver="cuda", page_bytes=16384))
    assert cache.stats().page_bytes == 16384
    with pytest.raises(ConfigError, match=r"page_bytes is 5000.*4096"):
        create_kv_backend(make_config(driver="cuda", page_bytes=5000))


def test_a_paged_step_names_its_stream():
    with create_kv_backend(make_config(driver="cuda"), "paged") as cache:
        assert cache.begin_step(5).stream == 5


def test_no_page_goes_while_the_stream_that_reads_it_runs(stand_in):
    """The stream comes as a pointer; pages dropped in a step wait for what was enqueued there."""
    stand_in.ctl("query_runs=0")
    stand_in.start()
    stream = stand_in.value("cuStreamCreate", 1)
    engine = Engine("virtual(cuda)", "power of two")
    engine.admit(0, BASES[0][:40])
    step = engine.cache.begin_step(stream)
    assert step.stream == stream
    slot = engine.cache.slot_of(0)
    key, _ = engine.cache.layer_views(0)
    stand_in.touch(key[slot].data_ptr(), 10 * 4096, stream=stream)
    engine.truncate(0, 4)
    engine.cache.end_step(step)
    engine.cache.end_step(engine.cache.begin_step(stream))
    assert engine.cache.stats().retired_pages == 9
    assert stand_in.pending(stream) > 0
    assert stand_in.run_stream(stream) == fakecuda.SUCCESS  # 700 if a page had gone
    engine.cache.end_step(engine.cache.begin_step(stream))
    engine.cache.trim()
    assert engine.cache.stats().retired_pages == 0
    engine.check()
    engine.cache.close()
    stand_in.check("cuStreamDestroy_v2", stream)
    stand_in.check("cuDevicePrimaryCtxRelease_v2", 0)


def test_a_decode_step_without_a_page_crossing_makes_no_driver_call(stand_in):
    engine = Engine("virtual(cuda)", "power of two")  # four rows a page
    for seq_id in range(4):
        engine.admit(seq_id, BASES[0][: 41 + seq_id % 2])
    out = KVBatchBuffers.allocate(8)
    cache = engine.cache

    def decode(num_tokens):
        step = cache.begin_step()
        assert cache.try_extend([0, 2], [num_tokens] * 2)
        view = cache.batch_view([0, 2], [1, 1], out=out, pad_to=8)
        cache.end_step(step)
        return view

    decode(42)  # takes the slot to pad with
    before = stand_in.total_calls
    assert decode(43).seqused_k.tolist() == [43, 43, 1, 1, 1, 1, 1, 1]
    assert decode(44).seqused_k.tolist() == [44, 44, 1, 1, 1, 1, 1, 1]
    assert stand_in.total_calls == before
    decode(45)
    assert stand_in.total_calls > before


def test_a_null_cache_for_a_device_needs_no_driver(monkeypatch):
    monkeypatch.setenv("VMALLOC_LIBCUDA", NO_LIBRARY)
    cache = create_kv_backend(make_config(driver="null"))
    assert cache.try_admit(SequenceGroupSpec((0,), 20)) is not None
    assert choose_backend("auto", "cpu", "null").driver == "null"
