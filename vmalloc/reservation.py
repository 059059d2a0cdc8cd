"""How many rows a sequence is backed with at admission, by commit policy.

Owns: nothing.  Thread-safety: stateless.
"""

from __future__ import annotations

from .backend import SequenceGroupSpec
from .config import KVCacheConfig
from .errors import ConfigError


def reserved_tokens(config: KVCacheConfig, group: SequenceGroupSpec) -> int:
    """Rows that stay backed for each sequence of ``group``; 0 where they come on demand.

    The policies are those of section 6.1 of the PagedAttention paper (Kwon et al., SOSP 2023).
    Raises ``ConfigError`` if the policy needs the final length and it is not known.
    """
    if config.commit_policy == "on_demand":
        return 0
    if config.commit_policy == "max_length":
        return config.max_seq_len
    if group.final_tokens is None:
        raise ConfigError(
            f"commit_policy is {config.commit_policy!r}; final_tokens must tell how long the "
            "sequences will get"
        )
    if config.commit_policy == "oracle":
        return min(group.final_tokens, config.max_seq_len)
    num_prompt = group.num_tokens if group.prompt_tokens is None else group.prompt_tokens
    num_output = max(group.final_tokens - num_prompt, 1)
    return min(num_prompt + (1 << (num_output - 1).bit_length()), config.max_seq_len)
