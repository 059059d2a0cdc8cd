"""From the messages of a chat to the tokens of a prompt, by the model's own chat template.

Owns: nothing.  Thread-safety: none; one event loop. Templates run on the tokenizer's thread.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from .control_tokens import TextMarks, control_tokens, encode_pieces
from .errors import ApiError, invalid_field
from .state import ServerState
from .template_source import (
    PLAIN_TEMPLATE,
    TemplateSource,
    line_of,
    read_template,
    select_template,
)

_GIVEN = frozenset({"messages", "tools", "documents", "add_generation_prompt"})
"""Variables of a template that have a request field of their own."""

_FUNCTIONS = frozenset(
    {"raise_exception", "strftime_now", "namespace", "dict", "range", "lipsum", "cycler", "joiner"}
)


@dataclass(frozen=True, slots=True)
class RenderedPrompt:
    """A chat as the model reads it.

    Attributes:
        text: the rendered template.
        token_ids: its tokens. Where somebody typed a control token, these are not what encoding
            ``text`` gives: the typed one is spelled out as text.
    """

    text: str
    token_ids: list[int]


def template_of(state: ServerState, *, with_tools: bool = False) -> TemplateSource:
    """The template that chats of this server use. Raises ``ApiError`` if it cannot be read."""
    source = select_template(state.text.chat_template, with_tools=with_tools)
    try:
        return read_template(source)
    except jinja2.TemplateSyntaxError as error:
        raise ApiError(
            400, f"the chat template cannot be read, line {error.lineno}: {line_of(error)}"
        ) from error


async def render_chat(
    state: ServerState,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    template: TemplateSource | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    field: str = "messages",
) -> RenderedPrompt:
    """A chat's prompt.

    Control tokens in messages, tools and variables come out as text (``control_tokens``).

    Args:
        state: the server's.
        messages: plain values with ``role`` and ``content`` (text), as ``template_messages`` makes
            them.
        tools: OpenAI's tool definitions.
        add_generation_prompt: end where an assistant's message begins.
        continue_final_message: leave the last message open, to be gone on with.
        template: None: the server's.
        template_kwargs: further variables of the template.
        field: what the request calls its messages.

    Raises ``ApiError`` 400 with the template's words where it refuses or fails.
    """
    if add_generation_prompt and continue_final_message:
        raise invalid_field(
            "continue_final_message",
            "is true, and so is add_generation_prompt; a message is either begun or gone on with",
        )
    template = template or template_of(state, with_tools=bool(tools))
    variables = dict(template_kwargs or {})

    def render(tokenizer: Any) -> RenderedPrompt:
        _check_variables(tokenizer, template, variables)
        tokens = control_tokens(tokenizer, template.literals)
        plain = [dict(message) for message in messages]
        plain_tools = [dict(tool) for tool in tools] if tools else None
        marks = TextMarks(tokens, [plain, plain_tools or [], variables], field)
        rendered = _apply(
            tokenizer,
            field,
            marks.mark(plain),
            tools=marks.mark(plain_tools),
            chat_template=_source_for(tokenizer, template),
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **marks.mark(variables),
        )
        pieces = marks.split(rendered) if marks.is_needed else [rendered]
        return RenderedPrompt("".join(pieces), _encode(tokenizer, field, pieces, tokens))

    return await state.text.run(render)


def _apply(tokenizer: Any, field: str, messages: list[dict[str, Any]], **kwargs: Any) -> str:
    """The rendered text. Whatever a template raises is about what it was given."""
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)
    except Exception as error:
        raise ApiError(
            400,
            f"{field} cannot be rendered by the model's chat template: {line_of(error)}",
            param=field,
            code="chat_template_error",
        ) from error
    return text


def _encode(tokenizer: Any, field: str, pieces: list[str], tokens: tuple[str, ...]) -> list[int]:
    try:
        return encode_pieces(tokenizer, pieces, tokens, field)
    except (TypeError, UnicodeError) as error:  # a template cut a character in two
        raise ApiError(400, f"{field} cannot be encoded: {line_of(error)}", param=field) from error


def _source_for(tokenizer: Any, template: TemplateSource) -> str:
    """The source; the plain one begins as this tokenizer begins every text."""
    if template.source != PLAIN_TEMPLATE or tokenizer.bos_token_id is None:
        return template.source
    begins = tokenizer.encode("")[:1] == [tokenizer.bos_token_id]
    return "{{ bos_token }}" + PLAIN_TEMPLATE if begins else PLAIN_TEMPLATE


def _check_variables(
    tokenizer: Any, template: TemplateSource, variables: Mapping[str, Any]
) -> None:
    """Raise ``ApiError`` for a variable that would have no effect, or another than it says."""
    apply: Callable[..., Any] = tokenizer.apply_chat_template
    taken = _GIVEN | _FUNCTIONS | set(tokenizer.special_tokens_map)
    taken |= set(inspect.signature(apply).parameters)
    allowed = sorted(template.variables - taken)
    for name in variables:
        if name not in allowed:
            raise ApiError(
                400,
                f"chat_template_kwargs has {name!r}; the chat template's variables are: "
                f"{', '.join(allowed) or 'none'}",
                param="chat_template_kwargs",
                code="unknown_parameter",
            )
