"""What both of transformers' workers share: the model, and settings of generation.

Owns: nothing.  Thread-safety: stateless.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from measured import Job


class Libraries:
    """torch and transformers, with what transformers would else import on first use."""

    def __init__(self) -> None:
        import torch
        import transformers
        from transformers.models.llama import modeling_llama

        self.torch: Any = torch
        self.transformers: Any = transformers
        self._model_class: Any = modeling_llama.LlamaForCausalLM
        self._config_class: Any = transformers.GenerationConfig

    def load_model(self, job: Job) -> Any:
        """The checkpoint in float32, in eval mode."""
        self.torch.set_num_threads(job.threads)
        self.torch.manual_seed(job.seed)
        return self._model_class.from_pretrained(job.model, dtype=self.torch.float32).eval()

    def generation_config(self, job: Job, **settings: Any) -> Any:
        """Greedy, or plain sampling without the default cut to 50 tokens; no end token."""
        return self._config_class(pad_token_id=0, **sampling(job), **settings)

    def versions(self) -> dict[str, str]:
        return {name: version(name) for name in ("torch", "transformers")}


def sampling(job: Job) -> dict[str, Any]:
    """How tokens are chosen, in transformers' words."""
    if job.is_greedy:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}


def token_bytes(model: Any) -> int:
    """K and V of one token, over all layers."""
    config = model.config
    rows: int = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return rows * 4
