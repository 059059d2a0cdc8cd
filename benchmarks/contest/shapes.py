"""Shapes of the Llamas with random weights that all peers serve, saved as checkpoints.

Owns: the folder of checkpoints.  Thread-safety: one process.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Shape:
    """A Llama with heads of 64, untied.

    Attributes:
        num_requests: by workload.
        generate_batch: prompts at once where an engine batches by hand.
        max_num_seqs: most streams at once.
        scale: of all lengths of a workload.
    """

    name: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    num_requests: dict[str, int]
    generate_batch: int
    max_num_seqs: int = 64
    scale: float = 1.0

    @property
    def num_parameters(self) -> int:
        """Weights, both embeddings included."""
        kv_size = self.num_kv_heads * HEAD_DIM
        attention = 2 * self.hidden_size * (self.num_heads * HEAD_DIM + kv_size)
        mlp = 3 * self.hidden_size * self.intermediate_size
        layer = attention + mlp + 2 * self.hidden_size
        embeddings = 2 * self.vocab_size * self.hidden_size
        return self.num_layers * layer + embeddings + self.hidden_size


HEAD_DIM = 64
CONTEXT_TOKENS = 1024

TINY = Shape(
    name="tiny",
    hidden_size=256,
    intermediate_size=704,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    vocab_size=512,
    num_requests={"offline": 64, "prefix": 32, "parallel": 16},
    generate_batch=16,
)
SMALL = Shape(
    name="small",
    hidden_size=768,
    intermediate_size=2048,
    num_layers=12,
    num_heads=12,
    num_kv_heads=4,
    vocab_size=8192,
    num_requests={"offline": 32, "prefix": 16, "parallel": 8},
    generate_batch=8,
)
NANO = Shape(
    name="nano",
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    vocab_size=288,
    num_requests={"offline": 6, "prefix": 4, "parallel": 2},
    generate_batch=4,
    scale=1 / 16,
)
SHAPES = {shape.name: shape for shape in (TINY, SMALL, NANO)}


def checkpoint(shape: Shape, folder: Path, seed: int) -> Path:
    """The shape's checkpoint below ``folder``, written if it is not there."""
    path = folder / f"{shape.name}-{shape.num_parameters}-{seed}"
    if (path / "config.json").exists():
        return path
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=HEAD_DIM,
        vocab_size=shape.vocab_size,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        dtype="float32",
    )
    partial = path.with_name(path.name + ".partial")
    LlamaForCausalLM(config).save_pretrained(partial)
    partial.rename(path)
    return path
