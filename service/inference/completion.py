"""What a completion is asked for by, what it is, and how its text grows token by token."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from service.errors import InvalidInputError

FinishReason = Literal["stop", "length"]

_REPLACEMENT = "\ufffd"
_CONTEXT_TOKENS = 4
_CHARACTERS_PER_TOKEN = 4
_PROMPT_TOKENS_PER_STEP = 32
"""Tokens of a prompt, which are read together, that cost about as much as one generated."""

MAX_LOGPROBS = 20
"""Most alternatives to a token."""


@dataclass(frozen=True)
class TokenLogprob:
    """A token and how probable it was before temperature and nucleus, in nats.

    Attributes:
        token_id: in the base model's vocabulary.
        text: the token alone; several tokens of one character each show a replacement character.
        logprob: None for the first token of a prompt, which nothing precedes.
        top: the most probable tokens as (id, text, logprob), the best first.
    """

    token_id: int
    text: str
    logprob: float | None
    top: tuple[tuple[int, str, float], ...] = ()


@dataclass(frozen=True)
class TextDelta:
    """What a running completion has grown by: neither half a character nor half a stop text.

    Attributes:
        text: what is new; may be empty where tokens came whose text is not final.
        logprobs: of the tokens that came since the last delta, where asked for.
        num_tokens: that were generated until now, since the beginning.
    """

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    num_tokens: int = 0


@dataclass(frozen=True, eq=False)
class CompletionRequest:
    """A prompt to continue, with an adapter or (no `adapter_id`) with the base model.

    Attributes:
        prompt: text to continue, or its tokens. An empty one starts from the base model's start
            token; where it has none, an empty prompt is an error.
        adapter_id: the adapter, None for the base model.
        vector: its values; not needed where it is sure to be in a slot.
        vector_sha256: where given, the slot's bytes are checked against it before and after.
        max_tokens: most tokens to generate; 0 only with `prompt_logprobs`.
        temperature: divides the logits; 0 is greedy decoding.
        top_p: probability mass of the nucleus that is sampled from; 1 is everything.
        seed: of sampling.
        stop: texts that end the completion and are not part of it.
        num_logprobs: None for none, else how many alternatives to each token are wanted beside
            its own log-probability.
        prompt_logprobs: the prompt's tokens get log-probabilities as well.
        tenant: whose request this is; tenants take turns.

    Raises:
        InvalidInputError: a value is out of its range.
    """

    prompt: str | tuple[int, ...]
    adapter_id: str | None = None
    vector: Float[Tensor, " num_params"] | None = None
    vector_sha256: str | None = None
    max_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    num_logprobs: int | None = None
    prompt_logprobs: bool = False
    tenant: str = "public"

    def __post_init__(self) -> None:
        least = 0 if self.prompt_logprobs else 1
        if self.max_tokens < least:
            raise InvalidInputError(f"max_tokens is {self.max_tokens}: choose at least {least}")
        if self.num_logprobs is not None and not 0 <= self.num_logprobs <= MAX_LOGPROBS:
            raise InvalidInputError(f"{self.num_logprobs} logprobs: choose 0 to {MAX_LOGPROBS}")
        if not 0 <= self.temperature < math.inf:
            raise InvalidInputError(f"temperature is {self.temperature}: choose 0 or more")
        if not 0 < self.top_p <= 1:
            raise InvalidInputError(f"top_p is {self.top_p}: choose above 0, up to 1")
        if not 0 <= self.seed < 2**63:
            raise InvalidInputError(f"seed is {self.seed}: choose 0 to 2^63 - 1")
        if "" in self.stop:
            raise InvalidInputError("a stop text is empty: remove it")

    @property
    def work(self) -> int:
        """Steps that this may take, of one token each; reading the prompt is guessed."""
        is_text = isinstance(self.prompt, str)
        num_tokens = len(self.prompt) // (_CHARACTERS_PER_TOKEN if is_text else 1)
        return self.max_tokens + num_tokens // _PROMPT_TOKENS_PER_STEP + 1


@dataclass(frozen=True)
class Completion:
    """A finished completion.

    Attributes:
        text: continuation of the prompt, without the prompt and without a stop text.
        finish_reason: `stop`, an end token or a stop text; `length`, `max_tokens` reached.
        prompt_tokens: tokens of the prompt.
        completion_tokens: tokens generated; an end token and those of a stop text count.
        slot: slot of the bank that the adapter was taken from, 0 for the base.
        generation: number of the load that had filled the slot.
        seconds: duration by stage. `prefill`: until the first token; `decode`: from there to
            the last; the scheduler adds `queue`.
        token_ids: tokens generated, an end token among them.
        logprobs: of these tokens, where asked for.
        prompt_logprobs: of the prompt's tokens, where asked for.
    """

    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    slot: int
    generation: int
    seconds: Mapping[str, float] = field(default_factory=dict)
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None


class GrowingText:
    """Text of a completion while its tokens arrive.

    A token may hold a part of a character only (bytes of UTF-8), and some tokenizers write a
    token differently at the start of a text. So a few tokens are decoded together with those
    before them, and characters show when they are whole: `text` never ends with a part of one.

    Args:
        tokenizer: transformers tokenizer.
        prompt_ids: tokens before the completion.
        stop: texts that end it.
    """

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int], stop: tuple[str, ...]) -> None:
        self.text = ""
        self._tokenizer = tokenizer
        self._stop = stop
        self._settled = ""  # text of all tokens before the window, never to change again
        self._context = list(prompt_ids[-_CONTEXT_TOKENS:])
        self._window: list[int] = []
        self._context_characters = len(self._decode(self._context))

    def append(self, token: int) -> bool:
        """Adds a token; True where `text` now ended before a stop text.

        Of several stop texts the one that begins first ends the text. A stop text that has
        only begun stays in `text`: the next token may go on differently.
        """
        self._window.append(token)
        together = self._decode(self._context + self._window)
        fresh = together[self._context_characters :]
        num_searched = len(self.text)
        self.text = self._settled + fresh.rstrip(_REPLACEMENT)
        if not fresh.endswith(_REPLACEMENT):
            self._settled = self.text
            self._context, self._window = self._window, []
            self._context_characters = len(self._decode(self._context))
        return self._cut_at_stop(num_searched)

    def final_length(self, *, at_end: bool = False) -> int:
        """Characters of `text` that no later token can take away.

        Args:
            at_end: no token will come: all of it.
        """
        if at_end or not self._stop:
            return len(self.text)
        longest = max(map(len, self._stop)) - 1
        for start in range(max(0, len(self.text) - longest), len(self.text)):
            if any(stop.startswith(self.text[start:]) for stop in self._stop):
                return start
        return len(self.text)

    def _cut_at_stop(self, num_searched: int) -> bool:
        found = [
            index
            for stop in self._stop
            if (index := self.text.find(stop, max(0, num_searched - len(stop) + 1))) >= 0
        ]
        if found:
            self.text = self.text[: min(found)]
        return bool(found)

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text
