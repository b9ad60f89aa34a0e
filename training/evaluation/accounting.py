"""Bytes of a generator against bytes of one stored adapter per task."""

from dataclasses import dataclass

from torch import nn

from service.errors import InvalidInputError
from service.synthesis.bundle import Bundle
from service.synthesis.layout import AdapterLayout
from service.synthesis.task_encoder import HiddenStateEncoder, TaskEncoder

FP16_BYTES = 2
INT8_BYTES = 1
SCALE_BYTES = 4
"""An int8 tensor has one float32 scale: `w = scale * q`, `q` in -127 to 127."""

_GENERATOR_FILES = (
    "bundle.json",
    "decoder.safetensors",
    "statistics.safetensors",
    "task_vectors.safetensors",
)


@dataclass(frozen=True)
class Storage:
    """Bytes of a generator's parts, and of a stored adapter of the same layout.

    Attributes:
        generator: decoder, statistics, task vectors and manifest, as files.
        bases: frozen factors that generated and stored adapters share, as a file.
        encoder: weights of the task encoder in memory; 0 where it is the base itself.
        fp16_adapter: one adapter with a float16 a value.
        int8_adapter: one adapter with an int8 a value and a float32 a tensor.
    """

    generator: int
    bases: int
    encoder: int
    fp16_adapter: int
    int8_adapter: int

    def break_even(self, adapter: int, *, with_encoder: bool = True) -> int:
        """Tasks from which on the generator takes no more bytes than stored adapters.

        The smallest N with `N adapter >= generator + encoder`. Bases count on neither side:
        stored adapters of the layout need the same.

        Args:
            adapter: bytes of one stored adapter: `fp16_adapter` or `int8_adapter`.
            with_encoder: whether the encoder is counted as the generator's.
        """
        return break_even(self.generator + (self.encoder if with_encoder else 0), adapter)


def measure_storage(bundle: Bundle, encoder: TaskEncoder) -> Storage:
    """Bytes of a bundle on disk, of its encoder and of stored adapters."""
    sizes = {name: (bundle.folder / name).stat().st_size for name in _GENERATOR_FILES}
    return Storage(
        generator=sum(sizes.values()),
        bases=(bundle.folder / "bases.safetensors").stat().st_size,
        encoder=count_encoder_bytes(encoder),
        fp16_adapter=count_adapter_bytes(bundle.layout, FP16_BYTES),
        int8_adapter=count_adapter_bytes(bundle.layout, INT8_BYTES),
    )


def count_adapter_bytes(layout: AdapterLayout, value_bytes: int) -> int:
    """Bytes of one stored adapter; below two bytes a value, each tensor has a scale."""
    scales = len(layout.entries) * SCALE_BYTES if value_bytes < FP16_BYTES else 0
    return layout.num_params * value_bytes + scales


def count_encoder_bytes(encoder: TaskEncoder) -> int:
    """Bytes of an encoder's weights; none where it is the base, which is there anyway."""
    if isinstance(encoder, HiddenStateEncoder):
        return 0
    networks = [part for part in vars(encoder).values() if isinstance(part, nn.Module)]
    weights = [weight for network in networks for weight in network.parameters()]
    return sum(weight.numel() * weight.element_size() for weight in weights)


def break_even(fixed: int, per_task: int) -> int:
    """Smallest number of tasks with `tasks * per_task >= fixed`, all in bytes.

    Raises:
        InvalidInputError: an adapter of no bytes, which nothing can break even with.
    """
    if per_task < 1 or fixed < 0:
        raise InvalidInputError(
            "bytes of an adapter are positive, those of a generator not below 0"
        )
    return -(-fixed // per_task)
