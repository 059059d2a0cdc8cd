"""Imports what takes seconds; servers that are forked afterwards have it.

Nothing is computed here: a process with threads must not be forked.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "0")  # read when libgomp loads, so before torch
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# transformers imports these when they are asked for, which takes seconds too.
from transformers import (  # noqa: F401
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import vmalloc.cli
import vmalloc.engine
import vmalloc.server
import vmalloc.server.run  # noqa: F401
