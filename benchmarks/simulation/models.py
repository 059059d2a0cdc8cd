"""Shapes of decoders, and what a step of one costs at least: a roofline.

Owns: nothing.  Thread-safety: immutable.
"""

from __future__ import annotations

from dataclasses import dataclass

from vmalloc import LayerKVSpec

from .hardware import Device

ITEM_BYTES = 2  # bfloat16


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A Llama-like decoder in bfloat16: grouped-query attention and a gated MLP.

    The figures are those of the models' published ``config.json``.
    """

    name: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int

    @property
    def layer_weights(self) -> int:
        """Weights of all layers' matrices: each token is multiplied with every one."""
        attention = self.hidden_size * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        mlp = 3 * self.hidden_size * self.intermediate_size
        return self.num_layers * (attention + mlp)

    @property
    def head_weights(self) -> int:
        """Weights of the output matrix: each token that is followed by a new one."""
        return self.vocab_size * self.hidden_size

    @property
    def weight_bytes(self) -> int:
        """All weights, the embeddings too."""
        return ITEM_BYTES * (self.layer_weights + 2 * self.head_weights)

    @property
    def token_bytes(self) -> int:
        """K and V of a token."""
        return ITEM_BYTES * 2 * self.num_layers * self.num_kv_heads * self.head_dim


MODELS = {
    shape.name: shape
    for shape in (
        ModelShape("Llama-3.1-8B", 32, 4096, 14336, 32, 8, 128, 128256),
        ModelShape("Llama-3.1-70B", 80, 8192, 28672, 64, 8, 128, 128256),
    )
}


@dataclass(slots=True)
class StepWork:
    """What one step computes.

    Attributes:
        num_tokens: rows that go through the layers.
        num_logits: rows that go through the output matrix.
        context_tokens: tokens whose K and V are read, for each sequence.
        attended_pairs: pairs of a new token and one that it attends to.
    """

    num_tokens: int
    num_logits: int
    context_tokens: int
    attended_pairs: int


@dataclass(frozen=True, slots=True)
class Deployment:
    """A model on one or more equal GPUs, split over heads and columns.

    All GPUs map the same pages for their share of the heads, so one of them stands for all.

    Attributes:
        num_devices: GPUs; they divide the model's KV heads evenly.
        memory_utilization: share of a GPU's memory that weights and KV take; the rest is for
            activations.
    """

    model: ModelShape
    device: Device
    num_devices: int = 1
    memory_utilization: float = 0.9

    def __post_init__(self) -> None:
        if self.model.num_kv_heads % self.num_devices:
            raise ValueError(
                f"num_devices is {self.num_devices}; it must divide the {self.model.num_kv_heads} "
                f"KV heads of {self.model.name}"
            )
        if self.kv_bytes <= 0:
            raise ValueError(
                f"{self.model.name} has {self.model.weight_bytes} bytes of weights; "
                f"{self.num_devices} x {self.device.name} have room for fewer"
            )

    @property
    def layers(self) -> tuple[LayerKVSpec, ...]:
        """What one GPU stores of each layer."""
        shape = self.model
        num_kv_heads = shape.num_kv_heads // self.num_devices
        layer = LayerKVSpec(
            num_kv_heads=num_kv_heads,
            k_head_dim=shape.head_dim,
            v_head_dim=shape.head_dim,
            dtype="bfloat16",
        )
        return (layer,) * shape.num_layers

    @property
    def kv_bytes(self) -> int:
        """Room for K and V on one GPU."""
        room = self.device.memory_bytes * self.memory_utilization
        return int(room - self.model.weight_bytes / self.num_devices)

    def step_seconds(self, work: StepWork) -> float:
        """The shortest that a step can take: at each part's peak, parts one after another.

        Matrices take the longer of reading the weights and multiplying with them, attention the
        longer of reading K and V and multiplying with them; the GPUs' sums go round a ring.
        """
        shape, device, count = self.model, self.device, self.num_devices
        read = ITEM_BYTES * (shape.layer_weights + shape.head_weights) / count
        multiplied = 2 * shape.layer_weights * work.num_tokens / count
        multiplied += 2 * shape.head_weights * work.num_logits / count
        seconds = max(read / device.memory_bandwidth, multiplied / device.flops)
        read = shape.token_bytes * (work.context_tokens + work.num_tokens) / count
        multiplied = 4 * shape.num_layers * shape.num_heads * shape.head_dim * work.attended_pairs
        seconds += max(read / device.memory_bandwidth, multiplied / count / device.flops)
        summed = 2 * shape.num_layers * ITEM_BYTES * shape.hidden_size * work.num_tokens
        return seconds + 2 * (count - 1) / count * summed / device.link_bandwidth
