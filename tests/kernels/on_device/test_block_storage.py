"""Copies between blocks of torch tensors, all of a call in one launch a region."""

import pytest
import torch

from tests.kernels.paged import DEVICE
from vmalloc import KVCacheConfig, LayerKVSpec
from vmalloc.layout import plan_layout
from vmalloc.torch_block_storage import TorchBlockStorage

COPIES = [(0, 5, 3), (0, 3, 1), (6, 1, 4)]


@pytest.mark.parametrize("layers_per_group", [1, 3])
def test_launched_copies_are_those_of_the_cpu(layers_per_group: int) -> None:
    layer = LayerKVSpec(num_kv_heads=3, k_head_dim=24, v_head_dim=40, dtype="bfloat16")
    config = KVCacheConfig(
        layers=(layer,) * 3,
        max_num_seqs=1,
        max_seq_len=32,
        capacity_bytes=1 << 20,
        block_size=4,
        device=str(DEVICE),
        driver="cuda",
        layers_per_group=layers_per_group,
    )
    storage = TorchBlockStorage(config, plan_layout(config, page_bytes=1), num_blocks=8)
    generator = torch.Generator().manual_seed(1)
    for region in storage._regions:
        region.copy_(torch.randint(0, 256, region.shape, dtype=torch.uint8, generator=generator))
    expected = [region.cpu() for region in storage._regions]
    for region in expected:
        row_bytes = region.shape[1] // 4
        for source, target, num_rows in COPIES:
            region[target, : num_rows * row_bytes] = region[source, : num_rows * row_bytes]
    storage._launch_copies(COPIES)
    for region, wanted in zip(storage._regions, expected, strict=True):
        assert torch.equal(region.cpu(), wanted)
