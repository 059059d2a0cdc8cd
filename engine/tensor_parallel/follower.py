"""A rank other than 0: does to its cache what rank 0 did to its own, and computes what it computes.

Owns: its share of the model, and its KV cache.  Thread-safety: none; one thread.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from functools import partial

import torch
from transformers.utils import logging as logging_of_transformers

from ...errors import ConfigError, VmallocError
from ...plans import PlanExecutor, RankCache, take_ledger
from ..assembly import assemble
from ..config import EngineConfig
from ..startup import StartupPhases
from .agreement import agree
from .facts import meet_loaded, settings_facts, version_facts
from .messages import (
    Audit,
    Grant,
    Message,
    Report,
    Reset,
    RunStep,
    Sleep,
    Start,
    Stop,
    Trim,
    Wake,
    decode,
)
from .rank_channel import RankChannel
from .rank_report import RankReport
from .sharded_model import load_sharded_model

logger = logging.getLogger(__name__)


def follow(channel: RankChannel) -> None:
    """Be a rank of an engine until rank 0 says that it ends."""
    start = decode(channel.receive())
    if not isinstance(start, Start):
        raise ConfigError(f"the first message is a {type(start).__name__}; it must be Start")
    agree(channel, version_facts())
    config = replace(start.config, device=str(channel.device))
    logging_of_transformers.disable_progress_bar()  # rank 0 shows one, and that is enough
    model = load_sharded_model(
        start.model,
        config.dtype,
        channel.device,
        channel.rank,
        channel.size,
        partial(meet_loaded, channel),
    )
    follower = Follower(channel, model, config)
    try:
        follower.run()
    finally:
        follower.close()


class Follower:
    """What a rank other than 0 is made of, and what it does with each message."""

    def __init__(self, channel: RankChannel, model: torch.nn.Module, config: EngineConfig) -> None:
        self._channel = channel
        self._parts = assemble(
            model, config, owner=self, phases=StartupPhases(), least=channel.least
        )
        agree(channel, settings_facts(self._parts))
        self._own = RankCache(self._parts.backend)
        self._executor = PlanExecutor(self._parts.backend)
        self._failure: str | None = None
        self._computed_ns = 0

    def run(self) -> None:
        """Do what rank 0 says until it says stop."""
        with self._parts.stream.use():
            while not isinstance(message := decode(self._channel.receive()), Stop):
                self._handle(message)

    def close(self) -> None:
        """Give everything back."""
        self._parts.runner.close()
        self._parts.backend.close()
        self._parts.lease.give_back()

    def _handle(self, message: Message) -> None:
        match message:
            case RunStep():
                self._run_step(message)
            case Grant():
                self._grant(message)
            case Trim():
                self._own.trim(message.keep_free_pages)
                self._note_created()
            case Sleep():
                self._sleep()
            case Wake():
                self._wake()
            case Reset():
                self._reset(message)
            case Report():
                report = RankReport.of(self._channel.rank, self._own.cache)
                self._channel.gather(report.encode())
            case Audit():
                self._own.cache.check_invariants()
                self._channel.gather(take_ledger(self._own.cache).encode())
            case _:
                raise ConfigError(f"a {type(message).__name__} comes when the ranks have started")

    def _run_step(self, message: RunStep) -> None:
        if self._failure is None:
            try:
                self._executor.carry_out(message.operations)
            except Exception as error:  # whatever it is, no rank computes this step
                logger.exception("rank %d cannot carry out a plan", self._channel.rank)
                self._failure = f"{type(error).__name__}: {error}"
        if message.batch is None:
            return
        votes = self._channel.least([int(self._failure is None), -self._computed_ns])
        if votes[0]:
            self._parts.runner.compute(message.batch.unpack())
            self._computed_ns = time.monotonic_ns()

    def _grant(self, message: Grant) -> None:
        is_granted = self._own.try_grant(message.num_pages)
        is_everywhere = bool(self._channel.least([int(is_granted)])[0])
        granted = message.num_pages if is_everywhere else message.before
        self._own.end_grant(granted, keeps_pages=is_everywhere)

    def _sleep(self) -> None:
        is_asleep = self._own.cache.try_sleep()
        if (
            not self._channel.least([int(is_asleep)])[0]
            and is_asleep
            and not self._own.cache.try_wake()
        ):
            raise VmallocError("this rank cannot wake from a sleep that another could not begin")
        self._note_created()

    def _wake(self) -> None:
        is_awake = self._own.cache.try_wake()
        if self._channel.least([int(is_awake)])[0]:
            return
        if is_awake and not self._own.cache.try_sleep():
            raise VmallocError("this rank cannot sleep again while another has no memory to wake")
        self._note_created()

    def _reset(self, message: Reset) -> None:
        failure, self._failure = self._failure, None
        self._executor.drop_everything(message.capacity_bytes)
        self._channel.gather((failure or "").encode())
        self._channel.least([1])

    def _note_created(self) -> None:
        (granted,) = self._channel.least([self._own.num_created])
        self._own.keep(granted)
