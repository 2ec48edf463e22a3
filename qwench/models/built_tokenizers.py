"""Tokenizers built without a download: a small one of bytes and words, and Qwen's from its tiktoken ranks.

Both carry Qwen3's special tokens and chat template, so everything downstream treats them as it treats a downloaded one.
"""

from __future__ import annotations

import base64
import importlib.util
import itertools
from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from qwench.errors import ConfigError

END_OF_TEXT = "<|endoftext|>"
END_OF_TURN = "<|im_end|>"

_CONTROL_TOKENS = (END_OF_TEXT, "<|im_start|>", END_OF_TURN)
_MARKUP_TOKENS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")

_QWEN_VISION_TOKENS = (
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
_QWEN_CODE_TOKENS = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>")

ARITHMETIC_WORDS = ("\\boxed{", "user", "assistant", "system", "\n\n")
"""Words of one token in the small tokenizer, so that prompts and answers of the arithmetic tasks are short."""

_MAX_LENGTH = 131_072


def build_small_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer of 270 tokens: every byte (so any text round-trips), ARITHMETIC_WORDS, and Qwen3's special tokens.

    Digits are always single tokens. A word is one token only without letters around it: `user` is one, in `users` it is not.
    """
    byte_symbols = bytes_to_unicode()
    vocab = {byte_symbols[byte]: index for index, byte in enumerate(sorted(byte_symbols))}
    for word in ARITHMETIC_WORDS:
        vocab.setdefault("".join(byte_symbols[byte] for byte in word.encode()), len(vocab))
    # No merges: a piece of the splitter is one token if it is in the vocabulary (ignore_merges), else its bytes.
    tokenizer = Tokenizer(BPE(vocab, [], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\\boxed\{|\n\n|[A-Za-z]+|."), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(_added_tokens(_CONTROL_TOKENS, special=True))
    tokenizer.add_tokens(_added_tokens(_MARKUP_TOKENS, special=False))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TURN,
        pad_token=END_OF_TEXT,
        chat_template=QWEN3_CHAT_TEMPLATE,
        model_max_length=_MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def build_qwen_tokenizer(tiktoken_file: Path | None = None) -> PreTrainedTokenizerBase:
    """Build Qwen3's tokenizer from its tiktoken ranks; without a file, from the one in the installed `dashscope` package.

    Special tokens follow the ranks in Qwen3's order, so with the real file `<|endoftext|>` is 151643 and `</think>` 151668.

    Raises:
        ConfigError: no such file, or not a tiktoken file.
    """
    vocab, merges = _vocab_and_merges(read_tiktoken(tiktoken_file or find_qwen_tiktoken()))
    control = (*_CONTROL_TOKENS, *_QWEN_VISION_TOKENS)
    markup = (*_MARKUP_TOKENS[:2], *_QWEN_CODE_TOKENS, *_MARKUP_TOKENS[2:])
    added = [*_added_tokens(control, special=True), *_added_tokens(markup, special=False)]
    return Qwen2Tokenizer(
        vocab=vocab,
        merges=merges,  # type: ignore[arg-type]  # annotated too narrowly there: BPE itself takes pairs
        # Given with their ids, or eos and pad would be added first and take the first two.
        added_tokens_decoder=dict(enumerate(added, start=len(vocab))),
        eos_token=END_OF_TURN,
        pad_token=END_OF_TEXT,
        unk_token=None,  # type: ignore[arg-type]  # as in Qwen3's own tokenizer_config.json
        chat_template=QWEN3_CHAT_TEMPLATE,
        model_max_length=_MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def find_qwen_tiktoken() -> Path:
    """Return the path of `qwen.tiktoken` in the installed `dashscope` package, without importing the package."""
    spec = importlib.util.find_spec("dashscope")
    path = Path(spec.origin).parent / "resources" / "qwen.tiktoken" if spec and spec.origin else None
    if path is None or not path.is_file():
        raise ConfigError(
            "the Qwen tokenizer is built from the file qwen.tiktoken of the package dashscope, which is not installed; "
            "`pip install dashscope`, or give the file with --qwen-tiktoken PATH."
        )
    return path


def read_tiktoken(path: Path) -> dict[bytes, int]:
    """Read `base64-token rank` lines, in order of rank."""
    if not path.is_file():
        raise ConfigError(f"there is no tiktoken file {path}; give an existing one with --qwen-tiktoken PATH.")
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError as error:
            raise ConfigError(f"{path}:{number} is not `base64 rank` ({error}); is this a tiktoken file?") from error
    return dict(sorted(ranks.items(), key=lambda item: item[1]))


def _vocab_and_merges(ranks: dict[bytes, int]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Turn tiktoken ranks into a byte-level BPE vocabulary and merges that give the same tokens.

    tiktoken merges the adjacent pair whose union has the lowest rank. Of a token's splits into two known tokens only the one
    that this procedure itself would arrive at can ever be applied, so that one split is its merge.
    """
    symbols = bytes_to_unicode()
    vocab = {"".join(symbols[byte] for byte in token): rank for token, rank in ranks.items()}
    merges = []
    for token, rank in ranks.items():
        if len(token) > 1:
            left, right = _last_merge(token, rank, ranks)
            merges.append(("".join(symbols[b] for b in left), "".join(symbols[b] for b in right)))
    return vocab, merges


def _last_merge(token: bytes, rank: int, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """Return the two parts that byte-pair encoding of `token` with ranks below `rank` ends with."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pair_ranks = [ranks.get(a + b, rank) for a, b in itertools.pairwise(parts)]
        best = min(range(len(pair_ranks)), key=pair_ranks.__getitem__)
        if pair_ranks[best] >= rank:
            break
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    if len(parts) != 2:
        raise ConfigError(f"tiktoken rank {rank} ({token!r}) is no merge of lower ranks; the file is no BPE vocabulary.")
    return parts[0], parts[1]


def _added_tokens(tokens: Sequence[str], *, special: bool) -> list[AddedToken]:
    return [AddedToken(token, normalized=False, special=special) for token in tokens]


# Qwen3's template. Reasoning is rendered for assistant turns after the last real user turn alone; tool responses are user turns
# that do not count. A final assistant turn always has it, perhaps empty. `enable_thinking=False` ends the generation prompt
# with an empty think block.
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
