"""Decides at load whether the fused decoder computes in a model's place: only if it was seen to.

Owns: nothing.  Thread-safety: stateless; the model must not be in use.
"""

from __future__ import annotations

import logging

import torch

from ...backend import KVBackend
from ...errors import ConfigError
from ...kernels.decoder_cpu import CpuDecoder
from ...kernels.decoder_spec import DecoderSpec
from ...kernels.select import AttentionKernels
from ..cache_factory import CacheFactory
from ..config import EngineConfig
from ..probe import ProbedModel, probe_logits, relative_difference
from ..tensor_parallel.rank_share import share_of
from ..trial import MAX_TRIAL_TOKENS
from .forward import FusedForward
from .recognise import recognise

logger = logging.getLogger(__name__)

RELATIVE_TOLERANCE = 1e-4
"""Allowed difference of its logits from the model's own, as a share of the largest logit."""


def choose_fused(
    model: torch.nn.Module,
    probed: ProbedModel,
    caches: CacheFactory,
    config: EngineConfig,
    max_model_len: int,
) -> CpuDecoder | str:
    """A decoder that gives a model's logits, or why the model's own forward pass is used.

    Warns where it recognised the model and gives other logits all the same. Raises ``ConfigError``
    if ``config.fused`` is ``"on"`` and there is none.
    """
    choice = _choose(model, probed, caches, config, max_model_len)
    if isinstance(choice, str) and config.fused == "on":
        raise ConfigError(f"fused is 'on'; {type(model).__name__} cannot be fused: {choice}")
    return choice


def _choose(
    model: torch.nn.Module,
    probed: ProbedModel,
    caches: CacheFactory,
    config: EngineConfig,
    max_model_len: int,
) -> CpuDecoder | str:
    if config.fused == "off":
        return "fused is 'off'"
    if config.compile:
        return "compile is True"
    share = share_of(model)
    if share is not None:
        return f"its weights are sharded over {share.size} ranks"
    if caches.device.type != "cpu":
        return f"it computes on cpu, and the model is on {caches.device}"
    spec = recognise(model, probed.attention, max(max_model_len, MAX_TRIAL_TOKENS))
    if isinstance(spec, str):
        return spec
    choice = check_against(spec, model, probed, caches)
    if isinstance(choice, str):
        logger.warning("%s keeps its own forward pass: %s", type(model).__name__, choice)
    return choice


def check_against(
    spec: DecoderSpec, model: torch.nn.Module, probed: ProbedModel, caches: CacheFactory
) -> CpuDecoder | str:
    """The decoder of ``spec`` if its logits on the probe's batch are the model's, else the reason
    against it."""
    try:
        decoder = CpuDecoder(spec)
    except ConfigError as error:
        return str(error)

    def make_forward(backend: KVBackend, kernels: AttentionKernels) -> FusedForward:
        return FusedForward(decoder, backend)

    logits = probe_logits(model, probed.layers, probed.num_heads, make_forward, caches)
    for ours, theirs in zip(logits, probed.logits, strict=True):
        if ours.shape != theirs.shape:
            return f"its fused logits have shape {tuple(ours.shape)}, not {tuple(theirs.shape)}"
        difference = relative_difference(ours, theirs)
        if not difference <= RELATIVE_TOLERANCE:
            return (
                f"its fused logits differ by {difference:.1e} of the largest one; "
                f"allowed: {RELATIVE_TOLERANCE:.0e}"
            )
    return decoder
