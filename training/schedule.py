"""Learning rates over the steps of a training."""

import math


def warm_cosine(step: int, num_steps: int, warm_steps: float, floor: float = 0.0) -> float:
    """Share of the peak: linear warm-up over `warm_steps`, then cosine decay to `floor`."""
    warm = min(1.0, (step + 1) / max(1, warm_steps))
    return warm * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * step / num_steps)))
