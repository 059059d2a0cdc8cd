"""Fields that every endpoint that generates has: how tokens are chosen, and when it ends.

A field that is null has its default.

Owns: nothing.  Thread-safety: plain values.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from .base import ApiRequest, accepted, unsupported
from .structured import Choices, ResponseFormat, StructuredOutputs
from .values import BadWords, EarlyStopping, LogitBias, SchemaOrText, StopStrings, TokenIds

MAX_N = 128
"""Most completions, candidates and beams of a prompt; OpenAI's limit."""

MIN_SEED, MAX_SEED = -(2**63), 2**64 - 1
"""OpenAI's seeds are signed, vLLM's and the engine's are not."""

_Share = Annotated[float, Field(gt=0.0, le=1.0)]
_Penalty = Annotated[float, Field(ge=-2.0, le=2.0)]
_Count = Annotated[int, Field(ge=1, le=MAX_N)]
_Text = Annotated[str, Field(min_length=1)]
_Label = Annotated[str, Field(max_length=1024)]


class StreamOptions(ApiRequest):
    """What a stream tells besides the text."""

    include_usage: bool | None = Field(
        False, description="a last chunk without choices holds the usage"
    )
    continuous_usage_stats: bool | None = Field(
        False, description="every chunk holds the usage of its choice so far; vLLM's"
    )
    include_obfuscation: unsupported(  # type: ignore[valid-type]
        "chunks are not padded", False
    ) = None


class SamplingFields(ApiRequest):
    """Fields that completions and chats share."""

    model: str | None = Field(None, description="name of the model; null: the served one")

    temperature: Annotated[float, Field(ge=0.0, le=2.0)] | None = Field(
        1.0, description="0 takes the most likely token"
    )
    top_p: _Share | None = Field(
        1.0, description="sample among the fewest tokens whose probabilities reach this sum"
    )
    top_k: Annotated[int, Field(ge=-1)] | None = Field(
        0, description="sample among the k most likely tokens; 0 or -1: all"
    )
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] | None = Field(
        0.0, description="drop tokens less likely than this share of the most likely one"
    )
    typical_p: _Share | None = Field(1.0, description="locally typical sampling")
    repetition_penalty: Annotated[float, Field(gt=0.0)] | None = Field(
        1.0, description="above 1: less of what prompt and answer hold already"
    )
    presence_penalty: _Penalty | None = Field(
        0.0, description="above 0: less of what the answer holds already"
    )
    frequency_penalty: _Penalty | None = Field(
        0.0, description="the same for each time that the answer holds it"
    )
    seed: Annotated[int, Field(ge=MIN_SEED, le=MAX_SEED)] | None = Field(
        None, description="same request and seed, same answer; negative ones count from 2**64 down"
    )
    logit_bias: LogitBias = Field(None, description="added to the logits of these token ids")
    allowed_token_ids: TokenIds = Field(None, description="no other token is chosen")
    bad_words: BadWords = Field(None, description="words that are not written")

    stop: StopStrings = Field(None, description="strings that end the text before them")
    stop_token_ids: TokenIds = Field(None, description="tokens that end the text")
    include_stop_str_in_output: bool | None = Field(
        False, description="keep what stopped it at the end of the text"
    )
    ignore_eos: bool | None = Field(False, description="go on past the model's end token")
    min_tokens: Annotated[int, Field(ge=0)] | None = Field(
        0, description="nothing stops it before so many tokens"
    )

    n: _Count | None = Field(1, description="completions of each prompt")
    best_of: _Count | None = Field(
        None,
        description="candidates, of which the `n` most likely are returned; not with `stream`",
    )
    use_beam_search: bool | None = Field(
        False, description="return the best `n` of `best_of` beams; not with `stream`"
    )
    beam_width: _Count | None = Field(
        None, description="`best_of` by another name, with `use_beam_search`"
    )
    length_penalty: Annotated[float, Field(ge=-10.0, le=10.0)] | None = Field(
        1.0, description="beams are ranked by log-probability / length ** this"
    )
    early_stopping: EarlyStopping = Field(
        False, description="when a beam search ends, as Hugging Face has it"
    )

    prompt_logprobs: Annotated[int, Field(ge=0)] | None = Field(
        None, description="log-probabilities of so many tokens at each place of the prompt; vLLM's"
    )
    return_tokens_as_token_ids: bool | None = Field(
        False, description="tokens in logprobs are written as `token_id:N`"
    )
    return_token_ids: bool | None = Field(
        False, description="choices hold `token_ids` and `prompt_token_ids`"
    )
    skip_special_tokens: bool | None = Field(
        True, description="leave special tokens out of the text"
    )

    response_format: ResponseFormat | None = Field(None, description="form of the text; OpenAI's")
    structured_outputs: StructuredOutputs | None = Field(
        None, description="form of the text; vLLM's"
    )
    guided_json: SchemaOrText = Field(None, description="`structured_outputs.json` by its old name")
    guided_regex: _Text | None = Field(
        None, description="`structured_outputs.regex` by its old name"
    )
    guided_choice: Choices | None = Field(
        None, description="`structured_outputs.choice` by its old name"
    )
    guided_grammar: _Text | None = Field(
        None, description="`structured_outputs.grammar` by its old name"
    )

    stream: bool | None = Field(False, description="send tokens as they come")
    stream_options: StreamOptions | None = Field(None, description="only with `stream`")
    priority: Annotated[int, Field(ge=-(2**31), le=2**31 - 1)] | None = Field(
        0, description="lower runs first; other than 0 needs `--scheduling-policy priority`"
    )
    cache_salt: _Text | None = Field(
        None, description="the prompt shares cached KV only with prompts of the same salt"
    )
    use_prefix_cache: bool | None = Field(
        True, description="start from cached KV of the same prompt beginning, if there is any"
    )

    user: _Label | None = accepted(description="not looked at")
    metadata: dict[str, Any] | None = accepted(description="not kept")
    store: Literal[False] | None = accepted(description="nothing is ever kept")
    service_tier: _Label | None = accepted(description="there is one tier")
    safety_identifier: _Label | None = accepted(description="not looked at")
    prompt_cache_key: _Label | None = accepted(description="equal prompts are found without it")
    prompt_cache_retention: _Label | None = accepted(
        description="cached prompts stay as long as there is room"
    )
    guided_decoding_backend: _Label | None = accepted(
        description="there is one way to enforce a form"
    )

    guided_whitespace_pattern: unsupported(  # type: ignore[valid-type]
        "white space between the tokens of JSON is free"
    ) = None
    structural_tag: unsupported(  # type: ignore[valid-type]
        "the whole text has a form, or none has"
    ) = None
    spaces_between_special_tokens: unsupported(  # type: ignore[valid-type]
        "text is what the tokenizer makes of the tokens", True
    ) = None
    truncate_prompt_tokens: unsupported(  # type: ignore[valid-type]
        "a prompt that is too long is refused, never cut"
    ) = None
    logits_processors: unsupported(  # type: ignore[valid-type]
        "functions cannot be sent; LLM.generate takes them"
    ) = None
    logprob_token_ids: unsupported(  # type: ignore[valid-type]
        "logprobs are those of the likeliest tokens"
    ) = None
    thinking_token_budget: unsupported(  # type: ignore[valid-type]
        "thinking is not told apart from the answer"
    ) = None
    repetition_detection: unsupported("use repetition_penalty") = None  # type: ignore[valid-type]
    request_id: unsupported(  # type: ignore[valid-type]
        "name the request with the X-Request-Id header"
    ) = None
    kv_transfer_params: unsupported("KV stays on this server") = None  # type: ignore[valid-type]
    vllm_xargs: unsupported("there are no plugins to take them") = None  # type: ignore[valid-type]
