"""The module graphs that the fused decoder can stand in for, by the classes they are made of.

Owns: nothing.  Thread-safety: immutable.

A class alone proves little: what a model of it computes is read from its modules and settings
(``recognise``), and its logits are compared before it is used (``trial``). The classes are what
the two cannot show, e.g. a factor that only far positions get. So a family is listed once someone
has read its code, and a subclass, which may do anything, is not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final


@dataclass(frozen=True, slots=True)
class Family:
    """Decoders of one ``transformers.models`` package.

    Attributes:
        package: its name.
        prefix: how its classes are called: ``LlamaAttention`` and so on.
        norm_offset: what its norms add to their weights.
        embedding: class of its input embedding.
        model: class of the layers' owner.
    """

    package: str
    prefix: str
    norm_offset: float = 0.0
    embedding: str = "Embedding"
    model: str = "Model"

    def is_class(self, module: Any, suffix: str) -> bool:
        """Whether ``module`` is this family's own ``prefix + suffix``, no subclass of it."""
        return self._is_named(module, self.prefix + suffix)

    @property
    def home(self) -> str:
        """The module that its classes are in."""
        return f"transformers.models.{self.package}.modeling_{self.package}"

    def is_embedding(self, module: Any) -> bool:
        """Whether ``module`` is the family's input embedding."""
        if self.embedding == "Embedding":
            return type(module).__module__ == "torch.nn.modules.sparse" and (
                type(module).__name__ == "Embedding"
            )
        return self._is_named(module, self.embedding)

    def _is_named(self, module: Any, name: str) -> bool:
        kind = type(module)
        return bool(kind.__module__ == self.home and kind.__qualname__ == name)


FAMILIES: Final = (
    Family("llama", "Llama"),
    Family("mistral", "Mistral"),
    Family("qwen2", "Qwen2"),
    Family("qwen3", "Qwen3"),
    Family("phi3", "Phi3"),
    Family("granite", "Granite"),
    Family("smollm3", "SmolLM3"),
    Family("olmo2", "Olmo2"),
    Family("cwm", "Cwm"),
    Family("ministral", "Ministral"),
    Family("seed_oss", "SeedOss"),
    Family("gemma", "Gemma", 1.0, "GemmaTextScaledWordEmbedding"),
    Family("gemma2", "Gemma2", 1.0, "Gemma2TextScaledWordEmbedding"),
    Family("gemma3", "Gemma3", 1.0, "Gemma3TextScaledWordEmbedding", "TextModel"),
)


def family_of(model: Any) -> Family | None:
    """The family of a causal language model, or None."""
    for family in FAMILIES:
        if family.is_class(model, "ForCausalLM"):
            return family
    return None
