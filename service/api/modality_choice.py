"""Which bundle a description is for, where a request names none."""

from collections import OrderedDict
from collections.abc import Mapping

from service.api.schemas import Modality
from service.errors import InvalidInputError
from service.synthesis.adapter_recipe import normalize_description
from service.synthesis.synthesizer import Synthesizer
from service.threads import Computations

MAX_REMEMBERED = 4096


class ModalityChoice:
    """Chooses the bundle whose training tasks lie nearest to a description.

    Answers are remembered, so that an adapter from the cache costs no second encoding. Lives
    on one event loop.

    Args:
        synthesizers: of the served bundles, at least one.
        computations: where descriptions are encoded.
    """

    def __init__(
        self, synthesizers: Mapping[Modality, Synthesizer], computations: Computations
    ) -> None:
        self._synthesizers = synthesizers
        self._computations = computations
        self._remembered: OrderedDict[str, Modality] = OrderedDict()

    async def choose(self, task: str) -> Modality:
        """The modality of a description; the only one where one bundle is served.

        Raises:
            InvalidInputError: an empty or over-long description.
        """
        if len(self._synthesizers) == 1:
            return next(iter(self._synthesizers))
        task = normalize_description(task)
        if task not in self._remembered:
            nearest = await self._computations.run(self._compare, task)
            if len(self._remembered) >= MAX_REMEMBERED:
                self._remembered.popitem(last=False)
            self._remembered[task] = nearest
        self._remembered.move_to_end(task)
        return self._remembered[task]

    def choose_by_texts(self) -> Modality:
        """The modality of example texts: text, where its bundle takes some.

        Raises:
            InvalidInputError: it does not, or is not served.
        """
        synthesizer = self._synthesizers.get("text")
        if synthesizer is None or synthesizer.example_tasks is None:
            raise InvalidInputError(
                "no bundle that is served takes example texts: describe the task in words"
            )
        return "text"

    def choose_by_images(self) -> Modality:
        """The modality of example images: of a bundle that takes some, rather detection.

        Raises:
            InvalidInputError: no bundle takes images.
        """
        order: tuple[Modality, ...] = ("detection", "text")
        for modality in order:
            synthesizer = self._synthesizers.get(modality)
            if synthesizer is not None and synthesizer.image_encoder is not None:
                return modality
        raise InvalidInputError(
            "no bundle that is served takes example images: describe the task in words"
        )

    def _compare(self, task: str) -> Modality:
        return max(self._synthesizers, key=lambda name: _similarity(self._synthesizers[name], task))


def _similarity(synthesizer: Synthesizer, task: str) -> float:
    try:
        return synthesizer.similarity(task)
    except InvalidInputError:  # a bundle that reads images only
        return -1.0
