"""Writes the answers of ``/v1/responses``, whole and as a stream.

Owns: per response, what was written.  Thread-safety: none; one event loop.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from ..engine import RequestOutput
from .chat_answer import ChoiceReader
from .chat_plan import ChatPlan
from .errors import ApiError
from .protocol.response_objects import ResponseObject
from .protocol.response_request import ResponseRequest
from .protocol.tools import NamedTool
from .sse import event
from .tool_parser import ParsedCall
from .usage import UsageCounter

Event = dict[str, Any]


def response_id(prefix: str) -> str:
    """A name that nothing else has, e.g. ``"resp_..."``."""
    return f"{prefix}_{uuid.uuid4().hex}"


@dataclass(frozen=True, slots=True)
class ResponsePlan:
    """What an answer has to hold.

    Attributes:
        body: the request.
        id, model, created_at: of the response.
        chat: the request as the engine got it.
    """

    body: ResponseRequest
    id: str
    model: str
    created_at: int
    chat: ChatPlan


class ResponseWriter:
    """One response and its events, which are numbered."""

    def __init__(self, plan: ResponsePlan) -> None:
        self._plan = plan
        self._reader = ChoiceReader(plan.chat)
        self._usage = UsageCounter()
        self._num_events = 0
        self._output: list[dict[str, Any]] = []
        self._message: dict[str, Any] | None = None  # the last item, while text is added to it
        self._logprobs: list[dict[str, Any]] = []  # of tokens that are not in an item yet
        self._settings = _settings(plan)
        self._status = "in_progress"
        self._error: dict[str, str] | None = None
        self._completed_at: int | None = None

    def start(self) -> Iterator[Event]:
        """That there is a response."""
        yield self._event("response.created", response=self.response())
        yield self._event("response.in_progress", response=self.response())

    def add(self, output: RequestOutput) -> Iterator[Event]:
        """What is new."""
        self._usage.add(0, output)
        for completion in output.outputs:
            self._logprobs += self._reader.logprobs(completion)
            for piece in self._reader.read(completion):
                if isinstance(piece, ParsedCall):
                    yield from self._add_call(piece)
                else:
                    yield from self._add_text(piece)
            if completion.is_finished and output.error is None:
                is_cut = completion.finish_reason == "length"
                self._status = "incomplete" if is_cut else "completed"

    def finish(self) -> Iterator[Event]:
        """The end of the last item and of the response."""
        if not self._output:
            yield from self._open_message()
        yield from self._close_message("incomplete" if self._status == "incomplete" else None)
        if self._status == "completed":
            self._completed_at = int(time.time())
        yield self._event(f"response.{self._status}", response=self.response())

    def fail(self, error: ApiError) -> Iterator[Event]:
        """Why nothing more comes."""
        self._status = "failed"
        self._error = {"code": error.code or "server_error", "message": error.message}
        yield self._event("response.failed", response=self.response())

    def response(self) -> dict[str, Any]:
        """The response as it is now."""
        is_over = self._status != "in_progress"
        is_cut = self._status == "incomplete"
        return {
            **self._settings,
            "status": self._status,
            "completed_at": self._completed_at,
            "error": self._error,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "output": list(self._output) if is_over else [],
            "usage": self._usage_now() if is_over and self._error is None else None,
        }

    def _add_text(self, text: str) -> Iterator[Event]:
        if self._message is None:
            yield from self._open_message()
        assert self._message is not None
        part = self._message["content"][0]
        part["text"] += text
        part["logprobs"] += self._logprobs
        logprobs, self._logprobs = self._logprobs, []
        yield self._event(
            "response.output_text.delta", **self._place(), delta=text, logprobs=logprobs
        )

    def _add_call(self, call: ParsedCall) -> Iterator[Event]:
        """A whole call; its arguments come in one piece."""
        yield from self._close_message()
        self._logprobs = []  # a call has none
        item: dict[str, Any] = {
            "type": "function_call",
            "id": response_id("fc"),
            "call_id": call.id,
            "name": call.name,
            "arguments": "",
            "status": "in_progress",
        }
        place = {"item_id": item["id"], "output_index": len(self._output)}
        yield self._event(
            "response.output_item.added", output_index=len(self._output), item=dict(item)
        )
        name = "response.function_call_arguments"
        yield self._event(f"{name}.delta", **place, delta=call.arguments)
        yield self._event(f"{name}.done", **place, name=call.name, arguments=call.arguments)
        item["arguments"], item["status"] = call.arguments, "completed"
        self._output.append(item)
        yield self._item_done(item)

    def _open_message(self) -> Iterator[Event]:
        part: dict[str, Any] = {
            "type": "output_text",
            "text": "",
            "annotations": [],
            "logprobs": [],
        }
        self._message = {
            "type": "message",
            "id": response_id("msg"),
            "role": "assistant",
            "status": "in_progress",
            "content": [part],
        }
        self._output.append(self._message)
        yield self._event(
            "response.output_item.added",
            output_index=len(self._output) - 1,
            item={**self._message, "content": []},
        )
        empty = {**part, "logprobs": []}
        yield self._event("response.content_part.added", **self._place(), part=empty)

    def _close_message(self, status: str | None = None) -> Iterator[Event]:
        if self._message is None:
            return
        message, place = self._message, self._place()
        part = message["content"][0]
        part["logprobs"] += self._logprobs
        self._logprobs = []
        message["status"] = status or "completed"
        self._message = None
        yield self._event(
            "response.output_text.done", **place, text=part["text"], logprobs=part["logprobs"]
        )
        yield self._event("response.content_part.done", **place, part=part)
        yield self._item_done(message)

    def _item_done(self, item: dict[str, Any]) -> Event:
        index = len(self._output) - 1
        return self._event("response.output_item.done", output_index=index, item=item)

    def _place(self) -> dict[str, Any]:
        """Where the open message's text is."""
        assert self._message is not None
        index = len(self._output) - 1
        return {"item_id": self._message["id"], "output_index": index, "content_index": 0}

    def _event(self, kind: str, **fields: Any) -> Event:
        number = self._num_events
        self._num_events += 1
        return {"type": kind, "sequence_number": number, **fields}

    def _usage_now(self) -> dict[str, Any]:
        usage = self._usage.total()
        return {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {
                "cached_tokens": usage.prompt_tokens_details.cached_tokens,
                "cache_write_tokens": 0,
            },
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage.total_tokens,
        }


def whole_response(plan: ResponsePlan, output: RequestOutput) -> ResponseObject:
    """The answer of a request that is finished."""
    writer = ResponseWriter(plan)
    for events in (writer.start(), writer.add(output), writer.finish()):
        for _ in events:
            pass
    return ResponseObject.model_validate(writer.response())


class ResponseEncoder:
    """The events of a stream; a ``StreamEncoder``. The last one says how it ended."""

    def __init__(self, plan: ResponsePlan) -> None:
        self._writer = ResponseWriter(plan)

    def start(self) -> Iterable[bytes]:
        """That there is a response."""
        return map(_encode, self._writer.start())

    def add(self, prompt_idx: int, output: RequestOutput) -> Iterable[bytes]:
        """What is new."""
        return map(_encode, self._writer.add(output))

    def finish(self) -> Iterable[bytes]:
        """The whole response."""
        return map(_encode, self._writer.finish())

    def fail(self, error: ApiError) -> Iterable[bytes]:
        """Why there is none."""
        return map(_encode, self._writer.fail(error))


def _encode(one: Event) -> bytes:
    return event(one, one["type"])


def _settings(plan: ResponsePlan) -> dict[str, Any]:
    """What a response says about how it was made."""
    body = plan.body
    text = {} if body.text is None else body.text.model_dump(exclude_none=True, by_alias=True)
    reasoning = {} if body.reasoning is None else body.reasoning.model_dump()
    choice: Any = body.tool_choice or "auto"
    if isinstance(choice, NamedTool):
        choice = {"type": "function", "name": choice.function.name}
    return {
        "id": plan.id,
        "object": "response",
        "created_at": plan.created_at,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "model": plan.model,
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "background": False,
        "store": False,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "top_logprobs": body.top_logprobs or 0,
        "text": {"format": {"type": "text"}, **text},
        "tool_choice": choice,
        "tools": [tool.model_dump() for tool in body.tools or ()],
        "truncation": "disabled",
        "metadata": body.metadata or {},
        "reasoning": {"effort": None, "summary": None, **reasoning},
        "service_tier": "default",
    }
