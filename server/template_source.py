"""What the source of a chat template says about it: variables, roles, how tools are called.

Owns: the facts about templates seen last.  Thread-safety: plain values; the cache has a lock.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
from jinja2.parser import Parser

from ..errors import ConfigError

PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'] | capitalize }}: {{ message['content'] }}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""For a model that brings none: ``User: ...`` and ``Assistant: ...``, one message after another.
Such a model was not taught to stop there; ``stop=["\\nUser:"]`` does it."""


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How a model that knows the template writes a call of a tool.

    Attributes:
        has_tags: the JSON object stands between ``<tool_call>`` and ``</tool_call>``; otherwise
            it is the whole answer.
        arguments_key: its name for the arguments, ``"arguments"`` or ``"parameters"``.
    """

    has_tags: bool
    arguments_key: str


@dataclass(frozen=True, slots=True)
class TemplateSource:
    """The facts about one template.

    Attributes:
        source: Jinja source.
        variables: names that it takes from outside.
        literals: its own text and strings.
    """

    source: str
    variables: frozenset[str]
    literals: str

    @property
    def has_tools(self) -> bool:
        """Whether it tells the model about tools."""
        return "tools" in self.variables

    @property
    def has_developer(self) -> bool:
        """Whether it knows the role ``developer``; otherwise that is a ``system`` message."""
        return "developer" in self.literals

    @property
    def has_tool_messages(self) -> bool:
        """Whether it shows what tools answered."""
        return "tool" in self.literals.split("\0")

    @property
    def has_tool_calls(self) -> bool:
        """Whether it shows the calls of earlier assistant messages."""
        return "tool_calls" in self.source

    @property
    def tool_format(self) -> ToolFormat | None:
        """How calls are written; None: in a way that is not JSON, or with no tools at all."""
        if not self.has_tools or "<function=" in self.literals or "<arg_key>" in self.literals:
            return None
        names = [name for name in ("arguments", "parameters") if f'"{name}"' in self.literals]
        key = "parameters" if names == ["parameters"] else "arguments"
        return ToolFormat("<tool_call>" in self.literals, key)


class _GenerationTag(jinja2.ext.Extension):
    """``{% generation %}``, which transformers adds to Jinja, as a block without a meaning."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(maxsize=8)
def read_template(source: str) -> TemplateSource:
    """The facts about a template. Raises ``jinja2.TemplateSyntaxError``."""
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    tree = environment.parse(source)
    literals: set[str] = {node.data for node in tree.find_all(jinja2.nodes.TemplateData)}
    literals |= {
        node.value for node in tree.find_all(jinja2.nodes.Const) if isinstance(node.value, str)
    }
    variables = jinja2.meta.find_undeclared_variables(tree)
    return TemplateSource(source, frozenset(variables), "\0".join(sorted(literals)))


def load_template(path: str) -> str:
    """The source in a file. Raises ``ConfigError`` if it cannot be read, or is no template."""
    try:
        source = Path(path).read_text(encoding="utf-8")
        read_template(source)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"chat_template is {path!r}; it cannot be read: {error}") from error
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(
            f"chat_template is {path!r}; line {error.lineno} is no Jinja: {error.message}"
        ) from error
    return source


def select_template(template: str | dict[str, str] | None, *, with_tools: bool) -> str:
    """The source to use where a tokenizer may have several, or none."""
    if template is None:
        return PLAIN_TEMPLATE
    if isinstance(template, str):
        return template
    if with_tools and "tool_use" in template:
        return template["tool_use"]
    return template.get("default", PLAIN_TEMPLATE)


def line_of(error: BaseException) -> str:
    """An error's words in one line."""
    words: Any = getattr(error, "message", None) or str(error) or type(error).__name__
    return re.sub(r"\s+", " ", str(words)).strip()
