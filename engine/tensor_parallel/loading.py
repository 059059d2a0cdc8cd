"""From a model's name to an engine over several ranks.

Owns: nothing.  Thread-safety: none; the thread that loads is the one that steps.
"""

from __future__ import annotations

import traceback
from dataclasses import replace
from functools import partial
from typing import Any

from ...errors import ConfigError
from ..config import EngineConfig
from ..devices import choose_device
from ..llm_engine import LLMEngine
from ..model_loader import read_config
from ..startup import StartupPhases
from .agreement import agree
from .facts import meet_loaded, version_facts
from .leader import RankLeader
from .messages import Start, encode
from .rank_group import DEFAULT_ENTRY, RankGroup
from .sharded_model import check_shardable, load_sharded_model


def load_parallel_engine(
    name: str,
    tokenizer: Any,
    config: EngineConfig,
    phases: StartupPhases,
    *,
    entry: str = DEFAULT_ENTRY,
) -> LLMEngine:
    """Start the other ranks, load every rank's share of a model, and make an engine of them.

    Args:
        name: a local folder or hub id.
        tokenizer: a tokenizer object, or None.
        config: ``tensor_parallel_size`` of at least 2.
        phases: times what takes long.
        entry: what the other ranks run, as ``RankGroup.start`` has it.

    Raises ``ConfigError``, ``UnsupportedModelError``, and ``RankLostError`` if a rank ends
    meanwhile; nothing is left of the others then.
    """
    size = config.tensor_parallel_size
    device = _shared_device(config)
    check_shardable(name, read_config(name, config.dtype, choose_device(device))[0], size)
    with phases.phase("start ranks"):
        group = RankGroup.start(
            size,
            device=device,
            entry=entry,
            port=config.tensor_parallel_port,
            timeout_s=config.tensor_parallel_timeout_s,
        )
    leader = RankLeader(group)
    try:
        with leader.explaining():
            group.channel.send(encode(Start(name, config)))
            agree(group.channel, version_facts())
            with phases.phase("load weights"):
                meet = partial(meet_loaded, group.channel)
                model = load_sharded_model(name, config.dtype, group.channel.device, 0, size, meet)
            config = replace(config, device=str(group.channel.device))
            return LLMEngine(model, tokenizer, config, phases=phases, leader=leader)
    except BaseException as error:
        leader.close()
        # Who keeps the error would keep the weights, and with them the sockets to the others.
        traceback.clear_frames(error.__traceback__)
        raise


def _shared_device(config: EngineConfig) -> str:
    """``"cpu"`` or ``"cuda"``: the kind of device that every rank has one of."""
    if config.device.startswith("cuda:"):
        raise ConfigError(
            f"device is {config.device!r} and tensor_parallel_size "
            f"{config.tensor_parallel_size}; it must be 'cuda', where rank r takes cuda:r"
        )
    return choose_device(config.device).type
