"""Log-probabilities in the two shapes of OpenAI's API."""

from collections.abc import Sequence

from service.api.openai.responses import (
    ChatLogprobs,
    LegacyLogprobs,
    TokenLogprobInfo,
    TopLogprob,
)
from service.inference.completion import TokenLogprob

LEAST_LOGPROB = -9999.0
"""What OpenAI's API writes for minus infinity, which JSON does not have."""

_REPLACEMENT = "\ufffd"


class TokenPlaces:
    """Where tokens begin in a text that grows.

    A token that holds a part of a character begins where the character does; one that the text
    does not show (an end token, or what follows a stop text) lies at the end.
    """

    def __init__(self) -> None:
        self._text = ""
        self._position = 0
        self._parts = 0  # tokens since `_position` that hold a part of a character

    def locate(self, tokens: Sequence[TokenLogprob], text: str) -> list[int]:
        """Offsets of the next tokens in the whole text, of which `text` is what came with them."""
        self._text += text
        return [self._locate(token.text) for token in tokens]

    def _locate(self, piece: str) -> int:
        if not piece or _REPLACEMENT in piece:
            self._parts += 1
            return self._position
        # Parts make at most one character each, so the token is near or it is not there.
        start = self._text.find(piece, self._position, self._position + self._parts + len(piece))
        if start < 0:
            return self._position
        self._position, self._parts = start + len(piece), 0
        return start


def build_legacy(
    tokens: Sequence[TokenLogprob], text: str, places: TokenPlaces, num_top: int
) -> LegacyLogprobs:
    """The shape of `/v1/completions`.

    Args:
        tokens: of the text.
        text: that came with them.
        places: finds them in the whole text.
        num_top: alternatives asked for; the token itself is always among them.
    """
    return LegacyLogprobs(
        tokens=[token.text for token in tokens],
        token_logprobs=[None if t.logprob is None else _clip(t.logprob) for t in tokens],
        top_logprobs=[_map_top(token) for token in tokens] if num_top else None,
        text_offset=places.locate(tokens, text),
    )


def build_chat(tokens: Sequence[TokenLogprob]) -> ChatLogprobs:
    """The shape of `/v1/chat/completions`."""
    return ChatLogprobs(
        content=[
            TokenLogprobInfo(
                **_describe(token.text, token.logprob).model_dump(),
                top_logprobs=[_describe(text, logprob) for _, text, logprob in token.top],
            )
            for token in tokens
            if token.logprob is not None
        ]
    )


def _map_top(token: TokenLogprob) -> dict[str, float] | None:
    """Alternatives by text; of several with one text the most probable counts."""
    if token.logprob is None:
        return None
    top: dict[str, float] = {}
    for _, text, logprob in token.top:
        top.setdefault(text, _clip(logprob))
    top.setdefault(token.text, _clip(token.logprob))
    return top


def _describe(text: str, logprob: float | None) -> TopLogprob:
    whole = _REPLACEMENT not in text
    value = LEAST_LOGPROB if logprob is None else _clip(logprob)
    return TopLogprob(token=text, logprob=value, bytes=list(text.encode()) if whole else None)


def _clip(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)
