"""The chat template that tokenizers built here carry; it renders what Qwen3's does.

    <|im_start|>user\\n ... <|im_end|>\\n<|im_start|>assistant\\n<think>\\n ... \\n</think>\\n\\n ... <|im_end|>\\n

Reasoning is rendered for assistant turns after the last real user turn alone; tool responses are user turns that do not
count. A final assistant turn always has it, perhaps empty. `enable_thinking=False` ends the generation prompt with an
empty think block.
"""

from __future__ import annotations

_TOOLS = """
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- '# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\n' }}
    {{- 'You are provided with function signatures within <tools></tools> XML tags:\\n<tools>' }}
    {%- for tool in tools %}
        {{- '\\n' + (tool | tojson) }}
    {%- endfor %}
    {{- '\\n</tools>\\n\\nFor each function call, return a json object with function name and arguments ' }}
    {{- 'within <tool_call></tool_call> XML tags:\\n<tool_call>\\n' }}
    {{- '{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
"""

_LAST_QUERY = """
{%- set query = namespace(last=messages | length - 1, found=false) %}
{%- for message in messages | reverse %}
    {%- if not query.found and message.role == 'user' and message.content is string
        and not (message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set query.found = true %}
        {%- set query.last = loop.revindex0 %}
    {%- endif %}
{%- endfor %}
"""

_ASSISTANT = """
        {%- set answer = namespace(reasoning='', content=content) %}
        {%- if message.reasoning_content is string %}
            {%- set answer.reasoning = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set answer.reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set answer.content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > query.last and (loop.last or answer.reasoning) %}
            {{- '<think>\\n' + answer.reasoning.strip('\\n') + '\\n</think>\\n\\n' + answer.content.lstrip('\\n') }}
        {%- else %}
            {{- answer.content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls or [] %}
            {%- if answer.content or not loop.first %}
                {{- '\\n' }}
            {%- endif %}
            {%- set call = tool_call.function or tool_call %}
            {{- '<tool_call>\\n{"name": "' + call.name + '", "arguments": ' }}
            {{- call.arguments if call.arguments is string else call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
"""

_TOOL = """
        {%- if loop.first or loop.previtem.role != 'tool' %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
"""

_MESSAGES = (
    """
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}"""
    + _ASSISTANT
    + """
    {%- elif message.role == 'tool' %}"""
    + _TOOL
    + """
    {%- endif %}
{%- endfor %}
"""
)

_GENERATION_PROMPT = """
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

QWEN3_CHAT_TEMPLATE = (_TOOLS + _LAST_QUERY + _MESSAGES + _GENERATION_PROMPT).strip("\n")
"""Jinja source; every block trims the whitespace before it, so only quoted text reaches the output."""
