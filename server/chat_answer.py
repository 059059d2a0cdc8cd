"""Writes the answers of ``/v1/chat/completions``, whole and as a stream.

A stream's chunks: one with the role for each choice; then text as it comes, and each call of a tool
in two: its name and id, then its arguments in one piece; one with the reason of the end.

Owns: per choice of a request, what was written.  Thread-safety: none; one event loop.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from ..engine import CompletionOutput, RequestOutput
from .chat_plan import ChatPlan
from .errors import ApiError
from .logprobs import chat_logprobs, prompt_logprobs
from .protocol.chat import ChatRequest
from .protocol.chat_answers import ChatCompletion
from .protocol.generation import PromptTokensDetails, Usage
from .sampling import value
from .sse import DONE, event
from .tool_parser import ParsedCall, ToolParser
from .usage import UsageCounter


@dataclass(frozen=True, slots=True)
class AnswerPlan:
    """What an answer has to hold.

    Attributes:
        body: the request.
        head: fields that all of its objects share, e.g. ``id``.
        chat: the request as the engine got it.
        echo: text that each choice starts with.
    """

    body: ChatRequest
    head: dict[str, Any]
    chat: ChatPlan
    echo: str


class ChoiceReader:
    """Tells text from calls in one choice, whole or as it comes."""

    def __init__(self, plan: ChatPlan) -> None:
        self._parser = None if plan.tools is None else ToolParser(plan.tools)
        self._logprob_format = plan.logprobs

    def read(self, completion: CompletionOutput) -> Iterator[str | ParsedCall]:
        """Text and calls that are certain with what is new."""
        if self._parser is None:
            if completion.text:
                yield completion.text
            return
        yield from self._parser.add(completion.text)
        if completion.is_finished:
            yield from self._parser.finish()

    def finish_reason(self, completion: CompletionOutput) -> str | None:
        """Why it ended. Calls that are followed by text that was cut off count as cut off."""
        if completion.finish_reason == "stop" and self._parser and self._parser.num_calls:
            return "tool_calls"
        return completion.finish_reason

    def logprobs(self, completion: CompletionOutput) -> list[dict[str, Any]]:
        """Of the tokens that are new."""
        if self._logprob_format is None or completion.logprobs is None:
            return []
        return chat_logprobs(self._logprob_format, completion.token_ids, completion.logprobs)


def whole_answer(plan: AnswerPlan, output: RequestOutput) -> ChatCompletion:
    """The answer of a request that is finished."""
    usage = UsageCounter()
    usage.add(0, output)
    answer: dict[str, Any] = {
        **plan.head,
        "object": "chat.completion",
        "choices": [_choice(plan, completion) for completion in output.outputs],
        "usage": usage.total(),
    }
    body, form = plan.body, plan.chat.logprobs
    if body.return_token_ids:
        answer["prompt_token_ids"] = output.prompt_token_ids
    if body.prompt_logprobs is not None and form is not None and output.prompt_logprobs is not None:
        form = replace(form, num_top=body.prompt_logprobs)
        answer["prompt_logprobs"] = prompt_logprobs(form, output.prompt_logprobs)
    return ChatCompletion.model_validate(answer)


def _choice(plan: AnswerPlan, completion: CompletionOutput) -> dict[str, Any]:
    reader = ChoiceReader(plan.chat)
    pieces = list(reader.read(completion))
    text = plan.echo + "".join(piece for piece in pieces if isinstance(piece, str))
    calls = [piece for piece in pieces if isinstance(piece, ParsedCall)]
    message: dict[str, Any] = {
        "role": "assistant",
        "content": text if text or not calls else None,
        "refusal": None,
    }
    if calls:
        message["tool_calls"] = [
            {**_call_name(call), "function": {"name": call.name, "arguments": call.arguments}}
            for call in calls
        ]
    choice: dict[str, Any] = {
        "index": completion.index,
        "message": message,
        "logprobs": _logprobs(plan, reader.logprobs(completion)),
        "finish_reason": reader.finish_reason(completion),
        "stop_reason": completion.stop_reason,
    }
    if plan.body.return_token_ids:
        choice["token_ids"] = completion.token_ids
    return choice


def _call_name(call: ParsedCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function"}


def _logprobs(plan: AnswerPlan, entries: list[dict[str, Any]]) -> dict[str, Any] | None:
    return {"content": entries, "refusal": None} if plan.body.logprobs else None


class _StreamedChoice:
    """What of one choice was sent, and what waits for the next chunk."""

    def __init__(self, plan: ChatPlan) -> None:
        self.reader = ChoiceReader(plan)
        self.num_calls = 0
        self.logprobs: list[dict[str, Any]] = []
        self.token_ids: list[int] = []


class ChatEncoder:
    """The events of a stream; a ``StreamEncoder``."""

    def __init__(self, plan: AnswerPlan) -> None:
        self._plan = plan
        self._head = {**plan.head, "object": "chat.completion.chunk"}
        self._choices = [_StreamedChoice(plan.chat) for _ in range(value(plan.body, "n"))]
        self._usage = UsageCounter()
        options = plan.body.stream_options
        self._has_usage = bool(options and options.include_usage)
        self._has_continuous_usage = bool(options and options.continuous_usage_stats)

    def start(self) -> Iterable[bytes]:
        """The role of every choice, and the echo."""
        plan = self._plan
        num_tokens = len(plan.chat.prompt.token_ids)
        usage = Usage(
            prompt_tokens=num_tokens,
            completion_tokens=0,
            total_tokens=num_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=0),
        )
        for index in range(len(self._choices)):
            chunk = self._chunk(index, {"role": "assistant", "content": ""}, usage=usage)
            if plan.body.return_token_ids and index == 0:
                chunk["prompt_token_ids"] = plan.chat.prompt.token_ids
            yield event(chunk)
            if plan.echo:
                yield event(self._chunk(index, {"content": plan.echo}, usage=usage))

    def add(self, prompt_idx: int, output: RequestOutput) -> Iterable[bytes]:
        """What is new of every choice."""
        self._usage.add(0, output)
        for completion in output.outputs:
            choice = self._choices[completion.index]
            choice.logprobs += choice.reader.logprobs(completion)
            if self._plan.body.return_token_ids:
                choice.token_ids += completion.token_ids
            for piece in choice.reader.read(completion):
                for delta in _deltas(choice, piece):
                    yield event(self._chunk(completion.index, delta))
            # What went wrong is told by an error, not by a choice.
            if completion.is_finished and output.error is None:
                yield event(self._chunk(completion.index, {}, completion))

    def finish(self) -> Iterable[bytes]:
        """The usage, if it was asked for, and the end."""
        if self._has_usage:
            usage = self._usage.total().model_dump()
            yield event({**self._head, "choices": [], "usage": usage})
        yield DONE

    def fail(self, error: ApiError) -> Iterable[bytes]:
        """What went wrong, and the end."""
        return (event(error.body()), DONE)

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        end: CompletionOutput | None = None,
        usage: Usage | None = None,
    ) -> dict[str, Any]:
        """A chunk of one choice, with whatever waits for one."""
        waiting = self._choices[index]
        choice: dict[str, Any] = {
            "index": index,
            "delta": delta,
            "logprobs": _logprobs(self._plan, waiting.logprobs) if waiting.logprobs else None,
            "finish_reason": None if end is None else waiting.reader.finish_reason(end),
        }
        if end is not None:
            choice["stop_reason"] = end.stop_reason
        if self._plan.body.return_token_ids:
            choice["token_ids"] = waiting.token_ids
        waiting.logprobs, waiting.token_ids = [], []
        chunk = {**self._head, "choices": [choice]}
        if self._has_continuous_usage:
            chunk["usage"] = (usage or self._usage.of_choice(0, index)).model_dump()
        elif self._has_usage:
            chunk["usage"] = None
        return chunk


def _deltas(choice: _StreamedChoice, piece: str | ParsedCall) -> Iterator[dict[str, Any]]:
    if isinstance(piece, str):
        yield {"content": piece}
        return
    index = choice.num_calls
    choice.num_calls += 1
    function = {"name": piece.name, "arguments": ""}
    yield {"tool_calls": [{"index": index, **_call_name(piece), "function": function}]}
    yield {"tool_calls": [{"index": index, "function": {"arguments": piece.arguments}}]}
