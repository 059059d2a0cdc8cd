"""Log lines: for people or as JSON, with the request they belong to in each of them.

Owns: the process's log handler.  Thread-safety: any thread, as ``logging`` is.

Prompts are in no line unless ``--enable-log-requests`` asks for their beginnings; keys never are.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import MISSING, fields
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, TextIO

from ..engine import EngineRequest, SamplingParams
from .config import LogFormat
from .request_id import request_id_var
from .request_record import RequestRecord

if TYPE_CHECKING:
    _StreamHandler = logging.StreamHandler[TextIO]
else:  # Python 3.10's has no parameter
    _StreamHandler = logging.StreamHandler

logger = logging.getLogger(__name__)

MAX_PROMPT_CHARS = 200
MAX_PROMPT_TOKENS = 20
QUIET_PATHS = frozenset({"/health", "/ready", "/metrics", "/version", "/favicon.ico"})
"""What monitors ask for all the time; their lines are for debugging only."""

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_NOT_SHOWN = frozenset({"output_kind", "logits_processors", "cache_salt"})


class TextFormatter(logging.Formatter):
    """``2026-01-31 12:00:00.123 INFO    [request] message``; a message is one line."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, and the traceback if there is one."""
        moment = datetime.fromtimestamp(record.created)
        stamp = f"{moment:%Y-%m-%d %H:%M:%S}.{moment.microsecond // 1000:03d}"
        request_id = request_id_var.get()
        where = "" if request_id == "-" else f"[{request_id}] "
        line = f"{stamp} {record.levelname:<7} {where}{one_line(record.getMessage())}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, request_id, and ``fields`` of it."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if (request_id := request_id_var.get()) != "-":
            entry["request_id"] = request_id
        entry.update(getattr(record, "fields", {}))
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


def one_line(text: str) -> str:
    """Text whose control characters cannot start a new line or steer a terminal."""
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


def setup_logs(log_format: LogFormat, stream: TextIO | None = None) -> logging.Handler:
    """Send the lines of this process, uvicorn's too, to ``stream`` (stderr) in one form.

    The handler replaces one that an earlier call made. What others do with the root logger stays.
    """
    handler = _Handler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    root = logging.getLogger()
    for old in [one for one in root.handlers if isinstance(one, _Handler)]:
        root.removeHandler(old)
    root.addHandler(handler)
    logging.getLogger("vmalloc").setLevel(logging.INFO)
    # One line a burst says it instead, see stats_log.py.
    logging.getLogger("vmalloc.engine.preemption").setLevel(logging.WARNING)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        uvicorn_logger = logging.getLogger(name)
        uvicorn_logger.handlers.clear()
        uvicorn_logger.propagate = True
        uvicorn_logger.setLevel(logging.WARNING)
    return handler


class _Handler(_StreamHandler):
    """Ours, to be found again."""


def log_access(record: RequestRecord, status: int, *, is_complete: bool) -> None:
    """The line of a request whose response is over."""
    level = logging.DEBUG if record.path in QUIET_PATHS and status < 400 else logging.INFO
    if not logger.isEnabledFor(level):
        return
    seconds = time.monotonic() - record.started
    line = f"{record.method} {record.path} {status} in {seconds:.3f} s"
    entry: dict[str, Any] = {
        "method": record.method,
        "path": record.path,
        "status": status,
        "seconds": round(seconds, 6),
    }
    if record.request_id is not None:
        details = [f"{record.num_generated_tokens} tokens written"]
        if record.num_prompt_tokens:
            details.insert(
                0, f"{record.num_prompt_tokens} of prompt ({record.num_cached_tokens} cached)"
            )
        if record.time_to_first_token_s is not None:
            details.append(f"the first after {record.time_to_first_token_s:.3f} s")
        if record.num_preemptions:
            details.append(f"preempted {_times(record.num_preemptions)}")
        line += ": " + ", ".join(details)
        entry |= {
            "response_id": record.request_id,
            "prompt_tokens": record.num_prompt_tokens,
            "cached_tokens": record.num_cached_tokens,
            "generation_tokens": record.num_generated_tokens,
            "ttft_seconds": record.time_to_first_token_s,
            "num_preemptions": record.num_preemptions,
            "finish_reasons": record.finish_reasons,
        }
    if record.abort_reason is not None:
        line += f"; given up: {record.abort_reason}"
        entry["abort_reason"] = record.abort_reason
    elif not is_complete:
        line += "; the response was cut short"
    logger.log(level, "%s", line, extra={"fields": entry})


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def log_prompts(request_id: str, requests: Sequence[EngineRequest]) -> None:
    """The beginnings of a request's prompts, and the parameters that are not as by default."""
    for idx, request in enumerate(requests):
        logger.info(
            "%s prompt %d: %s, %s",
            request_id,
            idx,
            _beginning(request.prompt),
            _settings(request.params),
        )


def _beginning(prompt: Any) -> str:
    token_ids = prompt
    if isinstance(prompt, dict):
        prompt, token_ids = prompt.get("prompt"), prompt.get("prompt_token_ids") or ()
    if isinstance(prompt, str):
        more = "..." if len(prompt) > MAX_PROMPT_CHARS else ""
        return f"{prompt[:MAX_PROMPT_CHARS]!r}{more}"
    more = ", ..." if len(token_ids) > MAX_PROMPT_TOKENS else ""
    shown = ", ".join(str(token_id) for token_id in token_ids[:MAX_PROMPT_TOKENS])
    return f"tokens [{shown}{more}] ({len(token_ids)})"


def _settings(params: SamplingParams) -> str:
    shown = []
    for one in fields(params):
        value = getattr(params, one.name)
        default = None if one.default is MISSING else one.default
        if one.name not in _NOT_SHOWN and value != default:
            shown.append(f"{one.name}={value!r}"[:MAX_PROMPT_CHARS])
    return ", ".join(shown) or "default parameters"
