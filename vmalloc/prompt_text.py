"""The texts of ``vmalloc generate``: prompts in, completions out as they come.

Owns: what is not on screen yet.  Thread-safety: none; one process, one command.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.style import Style

from .errors import ConfigError

_BOLD = Style(bold=True)


class _Completion(Protocol):
    """What is read of an engine's ``CompletionOutput``."""

    index: int
    text: str

    @property
    def is_finished(self) -> bool: ...


class _Output(Protocol):
    """What is read of an engine's ``RequestOutput``."""

    request_id: str
    is_finished: bool

    @property
    def outputs(self) -> Sequence[_Completion]: ...


class TextPrinter:
    """Prints texts in the order of the prompts and completions, each as it comes."""

    def __init__(self, prompts: list[str], num_completions: int = 1) -> None:
        self._prompts = prompts
        self._num_completions = num_completions
        self._console = Console()
        self._pending = [""] * len(prompts) * num_completions
        self._is_finished = [False] * len(prompts) * num_completions
        self._current = -1
        self._next()

    def add(self, output: _Output) -> None:
        """Take what is new of one request; show it if its completion is the one on screen."""
        first = int(output.request_id) * self._num_completions
        for completion in output.outputs:
            self._pending[first + completion.index] += completion.text
            self._is_finished[first + completion.index] = completion.is_finished
        if output.is_finished:  # also of completions that there are none of
            self._is_finished[first : first + self._num_completions] = [
                True
            ] * self._num_completions
        while self._current < len(self._pending):
            self._write(self._pending[self._current])
            self._pending[self._current] = ""
            if not self._is_finished[self._current]:
                break
            self._write("\n\n")
            self._next()

    def _next(self) -> None:
        self._current += 1
        if self._current < len(self._pending):
            prompt_idx, idx = divmod(self._current, self._num_completions)
            prompt = self._prompts[prompt_idx]
            if self._num_completions > 1:
                self._write(f"[{idx + 1}/{self._num_completions}] ")
            self._write(_BOLD.render(prompt) if self._console.is_terminal else prompt)

    def _write(self, text: str) -> None:
        # Past the console, which would expand tabs and drop carriage returns of the model's text.
        self._console.file.write(text)
        self._console.file.flush()


def read_prompts(prompts: list[str], prompts_file: Path | None) -> list[str]:
    """Prompts of the options, then those of the file. Raises ``ConfigError`` if there are none."""
    result = list(prompts)
    if prompts_file is not None:
        try:
            # Bytes, and cut at newlines alone: form feeds and the like belong to a prompt.
            text = prompts_file.read_bytes().decode("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"prompts file is {str(prompts_file)!r}: {error}") from error
        lines = [line.removesuffix("\r") for line in text.split("\n")]
        result += [_read_prompt_line(line) for line in lines if line.strip()]
    if not result:
        raise ConfigError("there is no prompt; give --prompt TEXT or --prompts-file FILE")
    return result


def _read_prompt_line(line: str) -> str:
    if line.startswith('"') and line.rstrip().endswith('"'):
        try:
            value = json.loads(line)
        except json.JSONDecodeError:
            return line
        if isinstance(value, str):
            return value
    return line
