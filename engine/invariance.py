"""Checks at load that rows do not depend on batch mates, where the engine promises that.

Owns: nothing.  Thread-safety: stateless; the model must not be in use.
"""

from __future__ import annotations

import torch

from ..errors import ConfigError
from .cache_factory import CacheFactory
from .model_loader import vocab_size
from .packed_forward import MakeForward
from .probe import ProbedModel
from .trial import run_trial

SUBJECT_TOKENS = 11
MATE_TOKENS = (1, 5, 13, 29, 61, 125)
"""Lengths of the batch mates tried: padded row counts from 16 to 136, plus all of them at once."""


def check_batch_invariance(
    model: torch.nn.Module,
    probed: ProbedModel,
    caches: CacheFactory,
    make_forward: MakeForward,
    *,
    pads_rows: bool,
) -> None:
    """Raise ``ConfigError`` unless a sequence's logits are bitwise the same beside any mates.

    ``make_forward`` makes the model's forward pass; ``pads_rows`` is ``ModelRunner``'s.
    """
    limit = vocab_size(model)
    subject = [(5 + 101 * idx) % limit for idx in range(SUBJECT_TOKENS)]
    mates = [[(7 + 37 * idx + num) % limit for idx in range(num)] for num in MATE_TOKENS]

    def logits_beside(batch: list[list[int]]) -> torch.Tensor:
        prompts = [subject, *batch]
        layers, num_heads = probed.layers, probed.num_heads
        return run_trial(make_forward, layers, num_heads, prompts, caches, pads_rows=pads_rows)[0]

    alone = logits_beside([])
    for batch in [*([mate] for mate in mates), mates]:
        logits = logits_beside(batch)
        if not torch.equal(alone, logits):
            difference = float((alone - logits).abs().max())
            raise ConfigError(
                f"batch_invariant is True; {type(model).__name__} gives logits that differ by "
                f"{difference:.1e} beside {sum(map(len, batch))} tokens of other sequences "
                "(experts of a mixture see a varying number of rows; on a GPU so may a product's "
                "parts)"
            )
