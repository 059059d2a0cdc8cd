"""Writes the answers of ``/v1/completions``, whole and as a stream.

Owns: per choice of a request, what was written.  Thread-safety: none; one event loop.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..engine import CompletionOutput, RequestOutput
from .errors import ApiError
from .logprobs import CompletionLogprobsWriter, LogprobFormat, prompt_logprobs
from .protocol.completions import CompletionRequest, CompletionResponse
from .sampling import value
from .sse import DONE, event
from .usage import UsageCounter


@dataclass(frozen=True, slots=True)
class CompletionPlan:
    """What an answer has to hold.

    Attributes:
        body: the request.
        head: fields that all of its objects share, e.g. ``id``.
        form: how log-probabilities are written.
        echoes: per prompt the text that its choices start with; None without ``echo``.
    """

    body: CompletionRequest
    head: dict[str, Any]
    form: LogprobFormat
    echoes: Sequence[str] | None


class ChoiceWriter:
    """One choice of an answer."""

    def __init__(self, plan: CompletionPlan, prompt_idx: int, index: int) -> None:
        self._plan = plan
        self._prompt_idx = prompt_idx
        self._index = prompt_idx * value(plan.body, "n") + index
        self._has_started = False
        self._logprobs: CompletionLogprobsWriter | None = None
        if plan.body.logprobs is not None:
            self._logprobs = CompletionLogprobsWriter(plan.form)

    def write(self, output: RequestOutput, completion: CompletionOutput) -> dict[str, Any]:
        """What is new, as a ``CompletionChoice``; the first one starts with the echo."""
        plan, is_first = self._plan, not self._has_started
        self._has_started = True
        text = completion.text
        if is_first and plan.echoes is not None:
            text = plan.echoes[self._prompt_idx] + text
        choice: dict[str, Any] = {
            "index": self._index,
            "text": text,
            "logprobs": self._new_logprobs(output, completion, is_first),
            # What went wrong is told by an error, not by a choice.
            "finish_reason": None if output.error is not None else completion.finish_reason,
            "stop_reason": completion.stop_reason,
        }
        if plan.body.return_token_ids:
            choice["token_ids"] = completion.token_ids
            if is_first:
                choice["prompt_token_ids"] = output.prompt_token_ids
        if plan.body.prompt_logprobs is not None and output.prompt_logprobs is not None:
            form = LogprobFormat(
                plan.form.vocabulary, plan.body.prompt_logprobs, plan.form.as_token_ids
            )
            choice["prompt_logprobs"] = prompt_logprobs(form, output.prompt_logprobs)
        return choice

    def _new_logprobs(
        self, output: RequestOutput, completion: CompletionOutput, is_first: bool
    ) -> dict[str, Any] | None:
        if self._logprobs is None:
            return None
        if is_first and self._plan.echoes is not None:
            echo = self._plan.echoes[self._prompt_idx]
            self._logprobs.add_prompt(echo, output.prompt_token_ids, output.prompt_logprobs or ())
        self._logprobs.add(completion.token_ids, completion.logprobs or ())
        return self._logprobs.take()


def whole_answer(plan: CompletionPlan, outputs: Sequence[RequestOutput]) -> CompletionResponse:
    """The answer of a request that is finished."""
    usage = UsageCounter()
    choices = []
    for prompt_idx, output in enumerate(outputs):
        usage.add(prompt_idx, output)
        for completion in output.outputs:
            writer = ChoiceWriter(plan, prompt_idx, completion.index)
            choices.append(writer.write(output, completion))
    return CompletionResponse.model_validate(
        {**plan.head, "choices": choices, "usage": usage.total()}
    )


class CompletionEncoder:
    """The events of a stream; a ``StreamEncoder``."""

    def __init__(self, plan: CompletionPlan) -> None:
        self._plan = plan
        self._writers: dict[tuple[int, int], ChoiceWriter] = {}
        self._usage = UsageCounter()
        options = plan.body.stream_options
        self._has_usage = bool(options and options.include_usage)
        self._has_continuous_usage = bool(options and options.continuous_usage_stats)

    def start(self) -> Iterable[bytes]:
        """Nothing comes before the first output."""
        return ()

    def add(self, prompt_idx: int, output: RequestOutput) -> Iterable[bytes]:
        """One chunk for each choice that has something new to show."""
        self._usage.add(prompt_idx, output)
        events = []
        for completion in output.outputs:
            key = (prompt_idx, completion.index)
            writer = self._writers.get(key)
            if writer is None:
                writer = self._writers[key] = ChoiceWriter(self._plan, *key)
            choice = writer.write(output, completion)
            if not _is_empty(choice):
                events.append(self._chunk(choice, key))
        return events

    def finish(self) -> Iterable[bytes]:
        """The usage, if it was asked for, and the end."""
        if self._has_usage:
            usage = self._usage.total().model_dump()
            yield event({**self._plan.head, "choices": [], "usage": usage})
        yield DONE

    def fail(self, error: ApiError) -> Iterable[bytes]:
        """What went wrong, and the end."""
        return (event(error.body()), DONE)

    def _chunk(self, choice: dict[str, Any], key: tuple[int, int]) -> bytes:
        chunk = {**self._plan.head, "choices": [choice]}
        if self._has_continuous_usage:
            chunk["usage"] = self._usage.of_choice(*key).model_dump()
        elif self._has_usage:
            chunk["usage"] = None
        return event(chunk)


def _is_empty(choice: dict[str, Any]) -> bool:
    """Whether a chunk would say nothing, as a character is not whole yet."""
    return not (
        choice["text"]
        or choice["finish_reason"]
        or choice.get("token_ids")
        or (choice["logprobs"] and choice["logprobs"]["tokens"])
    )
