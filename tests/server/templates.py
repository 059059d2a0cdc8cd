"""Chat templates for the demo tokenizer that know tools, as Qwen's and Llama's do."""

from __future__ import annotations

from pathlib import Path

from vmalloc.server.config import ServerConfig

TAGGED = r"""{{- bos_token }}
{%- if tools %}
    {{- '<|system|>' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\n\n' }}
    {%- endif %}
    {{- "# Tools\n<tools>" }}
    {%- for tool in tools %}
        {{- "\n" + (tool | tojson) }}
    {%- endfor %}
    {{- "\n</tools>\nAnswer with <tool_call>\n" }}
    {{- "{\"name\": <function-name>, \"arguments\": <args>}\n</tool_call>" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|system|>' + messages[0].content }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|user|>' + message.content }}
    {%- elif message.role == "assistant" %}
        {{- '<|assistant|>' + message.content }}
        {%- for call in message.tool_calls or [] %}
            {{- '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson }}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- eos_token }}
    {%- elif message.role == "tool" %}
        {{- '<|user|><tool_response>\n' + message.content + '\n</tool_response>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}
"""

BARE = r"""{{- bos_token }}
{%- if tools %}
    {{- '<|system|>' + (tools | tojson) + ' Respond in the format ' }}
    {{- '{"name": function name, "parameters": arguments}.' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "tool" %}
        {{- '<|user|>' + message.content }}
    {%- elif message.tool_calls %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|assistant|>{"name": "' + call.name + '", "parameters": ' }}
        {{- (call.arguments | tojson) + '}' }}
    {%- else %}
        {{- '<|' + message.role + '|>' + message.content }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
{%- endif %}
"""


def with_template(folder: Path, source: str) -> ServerConfig:
    """Settings of a server that uses a template."""
    path = folder / "chat_template.jinja"
    path.write_text(source)
    return ServerConfig(port=0, chat_template=str(path))
