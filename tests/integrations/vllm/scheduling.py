"""vLLM's real schedulers and requests without a model, for tests that answer for the workers."""

import torch
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheTensor,
)
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from vmalloc.integrations.vllm import engine_args
from vmalloc.integrations.vllm.scheduler import ElasticScheduler

BLOCK = 32
STRIDE = BLOCK * 2 * 2 * 64 * 4  # K and V, heads, head_dim, float32
LAYERS = ["layer.0", "layer.1"]
EXTENT_BYTES = 2 * max(STRIDE, 65536)


def make_config(model_path, watermark=0.0, **options):
    return EngineArgs(
        model=str(model_path),
        dtype="float32",
        max_model_len=256,
        max_num_seqs=8,
        block_size=BLOCK,
        enforce_eager=True,
        watermark=watermark,
        **engine_args(**options),
    ).create_engine_config()


def cache_config(num_blocks):
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=2, head_size=64, dtype=torch.float32)
    tensor = KVCacheTensor(
        size=num_blocks * STRIDE * len(LAYERS),
        layers=LAYERS,
        layer_stride=num_blocks * STRIDE,
        block_stride=STRIDE,
    )
    return KVCacheConfig(
        num_blocks=num_blocks,
        kv_cache_tensors=[tensor],
        kv_cache_groups=[KVCacheGroupSpec(layer_names=LAYERS, kv_cache_spec=spec)],
    )


def make_scheduler(model_path, num_blocks=64, is_async=False, **options):
    config = make_config(model_path, **options)
    config.scheduler_config.async_scheduling = is_async  # the CPU platform turns it off
    config.cache_config.num_gpu_blocks = num_blocks
    init_none_hash(sha256)
    return ElasticScheduler(
        vllm_config=config,
        kv_cache_config=cache_config(num_blocks),
        structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK,
        log_stats=True,
    )


def make_request(name, num_tokens, max_tokens=4, first=0, mm_features=None):
    """One whose prompt is ``first``, ``first + 1`` and so on."""
    return request_of(name, list(range(first, first + num_tokens)), max_tokens, mm_features)


def request_of(name, token_ids, max_tokens, mm_features=None):
    settings = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    settings.update_from_generation_config({}, 2)
    return Request(
        request_id=name,
        prompt_token_ids=token_ids,
        sampling_params=settings,
        pooling_params=None,
        mm_features=mm_features,
        block_hasher=get_request_block_hasher(BLOCK, sha256),
    )
