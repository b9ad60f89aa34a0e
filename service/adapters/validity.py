"""The gate that every adapter passes before it may serve, wherever it came from.

An adapter is valid where its values are finite, where the update of every module has norms like
those of the adapters that the generator gives for its own training wordings, and where it does
something, but not anything, to a probe prompt. Norms come from small factors, never from an
expanded update: with thin QR `B = Q R_B` and `A^T = P R_A`, the update `s B M A` has the singular
values of `s R_B M R_A^T`, which is `[r, r]`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from service.adapters.record import AdapterRecord
from service.errors import InvalidAdapterError
from service.synthesis.bases import AdapterBases, take_triangle
from service.synthesis.layout import AdaptedModule, AdapterKind
from service.synthesis.synthesizer import Synthesizer

MARGIN = 3.0
"""Factor by which a norm or an effect may leave the range of the training wordings."""

WORDINGS_PER_TASK = 2
"""Of the training wordings, how many of each task calibrate the gate: one takes 10 ms."""


@dataclass(frozen=True, eq=False)
class Probe:
    """What the adapted linears of the base see and say for a short prompt.

    Attributes:
        inputs: `[tokens, in_features]` by module path, float32.
        outputs: norm of the base's own output of these tokens, by module path.
    """

    inputs: Mapping[str, Float[Tensor, "tokens in_features"]]
    outputs: Mapping[str, float]


@dataclass(frozen=True)
class Measures:
    """Sizes of one adapter's update, modules in the layout's order.

    Attributes:
        frobenius: Frobenius norm of every module's update.
        spectral: largest singular value of every module's update.
        effect: norm of all updates' outputs for the probe, relative to the base's own.
    """

    frobenius: Float[Tensor, " modules"]
    spectral: Float[Tensor, " modules"]
    effect: float


class AdapterRuler:
    """Measures adapters of one layout.

    Args:
        bases: frozen bases, with the layout.
        probe: of the base model.
    """

    def __init__(self, bases: AdapterBases, probe: Probe) -> None:
        self.layout = layout = bases.layout
        self._inputs = [probe.inputs[module.path] for module in layout.modules]
        self._output_norm = sum(value**2 for value in probe.outputs.values()) ** 0.5
        self._right: list[Tensor] = []  # R_A of each module, where A is frozen
        self._left: list[Tensor] = []  # R_B of each module, where B is frozen
        self._seen: list[Tensor] = []  # A x^T of each module, where A is frozen
        for module, inputs in zip(layout.modules, self._inputs, strict=True):
            if layout.kind is not AdapterKind.LORA:
                down = bases.tensors[module.path, "A"].float()
                self._right.append(take_triangle(down.T))
                self._seen.append(down @ inputs.T)
            if layout.kind is AdapterKind.CORE:
                self._left.append(take_triangle(bases.tensors[module.path, "B"].float()))
        self._stacked = (
            [torch.stack(parts) for parts in (self._left, self._right, self._seen)]
            if layout.kind is AdapterKind.CORE and len({x.shape for x in self._seen}) == 1
            else None
        )

    @torch.inference_mode()
    def measure(self, vector: Float[Tensor, " num_params"]) -> Measures:
        """Sizes of an adapter; finite values only."""
        tensors = self.layout.unflatten(vector.float())
        if self._stacked is not None:
            left, right, seen = self._stacked
            cores = torch.stack([tensors[each.path, "core"] for each in self.layout.modules])
            half = left @ cores
            small, moved = half @ right.mT, half @ seen
            effect = moved.norm()
        else:
            parts = [
                self._reduce(index, module, tensors)
                for index, module in enumerate(self.layout.modules)
            ]
            small = torch.stack([part for part, _ in parts])
            effect = torch.stack([moved.norm() for _, moved in parts]).norm()
        scaling = self.layout.scaling
        return Measures(
            frobenius=torch.linalg.matrix_norm(small) * scaling,
            spectral=_largest_singular_values(small) * scaling,
            effect=float(effect) * scaling / self._output_norm,
        )

    def _reduce(
        self, index: int, module: AdaptedModule, tensors: Mapping[tuple[str, str], Tensor]
    ) -> tuple[Float[Tensor, "r r"], Float[Tensor, "r tokens"]]:
        """`R_B M R_A^T`, and the update's output for the probe in the columns of `Q`."""
        match self.layout.kind:
            case AdapterKind.CORE:
                left = self._left[index] @ tensors[module.path, "core"]
                return left @ self._right[index].T, left @ self._seen[index]
            case AdapterKind.LORA_SHARED_A:
                left = take_triangle(tensors[module.path, "lora_B"])
                return left @ self._right[index].T, left @ self._seen[index]
            case AdapterKind.LORA:
                left = take_triangle(tensors[module.path, "lora_B"])
                down = tensors[module.path, "lora_A"]
                return left @ take_triangle(down.T).T, left @ (down @ self._inputs[index].T)


class ValidityGate:
    """Refuses adapters that are unlike those of the training wordings.

    Args:
        ruler: measures adapters.
        training: adapters of the training wordings, all of strength 1.
        margin: factor by which a measure may leave their range, on either side.
    """

    def __init__(
        self,
        ruler: AdapterRuler,
        training: Sequence[Float[Tensor, " num_params"]],
        *,
        margin: float = MARGIN,
    ) -> None:
        assert training, "a gate is calibrated on at least one adapter"
        self.layout = ruler.layout
        self.margin = margin
        self._ruler = ruler
        measures = [ruler.measure(vector) for vector in training]
        frobenius = torch.stack([each.frobenius for each in measures])
        spectral = torch.stack([each.spectral for each in measures])
        effects = [each.effect for each in measures]
        self._frobenius = (frobenius.amin(0) / margin, frobenius.amax(0) * margin)
        self._spectral = (spectral.amin(0) / margin, spectral.amax(0) * margin)
        self._effect = (min(effects) / margin, max(effects) * margin)

    def check(self, vector: Float[Tensor, " num_params"], *, strength: float = 1.0) -> None:
        """Lets an adapter pass; takes a few milliseconds at most.

        Args:
            vector: the adapter.
            strength: factor on its update, by which measures are divided.

        Raises:
            InvalidAdapterError: it may not serve; says which module, and the numbers.
        """
        if vector.shape != (self.layout.num_params,):
            raise InvalidAdapterError(
                f"adapter vector has shape {tuple(vector.shape)}, expected "
                f"({self.layout.num_params},)",
                "layout",
            )
        if not torch.isfinite(vector).all():
            where = int((~torch.isfinite(vector)).nonzero()[0, 0])
            module = next(e.module for e in self.layout.entries if where < e.span.stop)
            raise InvalidAdapterError(
                f"{module}: the adapter holds values not finite", "not_finite"
            )
        measures = self._ruler.measure(vector)
        self._compare("frobenius", measures.frobenius / strength, self._frobenius)
        self._compare("spectral", measures.spectral / strength, self._spectral)
        effect, (low, high) = measures.effect / strength, self._effect
        if not low <= effect <= high:
            raise InvalidAdapterError(
                f"the adapter's effect on a probe prompt is {effect:.3g} of the base's output, "
                f"outside of {low:.3g} to {high:.3g}: the training adapters' times "
                f"{self.margin:g} either way",
                "effect",
            )

    def _compare(
        self, name: Literal["frobenius", "spectral"], norms: Tensor, bounds: tuple[Tensor, Tensor]
    ) -> None:
        low, high = bounds
        wrong = ~((low <= norms) & (norms <= high))  # also where a norm overflows
        if wrong.any():
            index = int(wrong.nonzero()[0, 0])
            raise InvalidAdapterError(
                f"{self.layout.modules[index].path}: the update's {name} norm is "
                f"{norms[index]:.3g}, outside of {low[index]:.3g} to {high[index]:.3g}: the "
                f"training adapters' times {self.margin:g} either way "
                f"({int(wrong.sum())} of {len(norms)} modules are outside)",
                name,
            )


class AdapterGates:
    """The gates of all bundles in service.

    Args:
        gates: by digest of the bundle.
        on_refused: called with the reason of each refusal, in any thread.
    """

    def __init__(
        self,
        gates: Mapping[str, ValidityGate],
        on_refused: Callable[[str], None] | None = None,
    ) -> None:
        self._gates = gates
        self._on_refused = on_refused

    def check(self, record: AdapterRecord) -> None:
        """Lets a record pass through the gate of its bundle; blocking, a few milliseconds.

        One of a bundle that is not in service passes: nothing here can serve it.

        Raises:
            InvalidAdapterError: it may not serve.
        """
        gate = self._gates.get(record.bundle_digest)
        if gate is None:
            return
        try:
            gate.check(record.vector, strength=record.strength)
        except InvalidAdapterError as error:
            if self._on_refused is not None:
                self._on_refused(error.reason)
            raise


def calibrate_gate(
    synthesizer: Synthesizer, probe: Probe, *, margin: float = MARGIN
) -> ValidityGate:
    """The gate of a bundle: generates the adapters of some of its training wordings.

    Raises:
        InvalidAdapterError: the generator gives values that are not finite.
    """
    bundle = synthesizer.bundle
    rows = [
        int(row)
        for task in range(len(bundle.tasks))
        for row in (bundle.owner == task).nonzero()[:WORDINGS_PER_TASK, 0]
    ]
    vectors = [synthesizer.decode(bundle.task_vectors[row]) for row in rows]
    return ValidityGate(AdapterRuler(bundle.bases, probe), vectors, margin=margin)


def _largest_singular_values(matrices: Float[Tensor, "modules r r"]) -> Float[Tensor, " modules"]:
    values: Tensor = torch.linalg.svdvals(matrices)
    return values[:, 0]
