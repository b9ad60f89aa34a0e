"""Log-probabilities of tokens, as OpenAI's `logprobs` and perplexity measurements want them."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from service.inference.completion import TokenLogprob


class LogprobReader:
    """Reads log-probabilities (nats) of chosen tokens, and of the best ones, off logits.

    They are those of the model: before temperature and nucleus.

    Args:
        tokenizer: writes tokens as text.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def read(
        self, logits: Float[Tensor, "tokens vocab"], token_ids: Sequence[int], num_top: int
    ) -> list[TokenLogprob]:
        """One entry per token, `num_top` alternatives each."""
        if not token_ids:
            return []
        table = logits.float().log_softmax(dim=-1)
        chosen = torch.tensor(token_ids, device=table.device)
        own = table.gather(1, chosen[:, None])[:, 0].tolist()
        best = table.topk(num_top, dim=-1) if num_top else None
        entries = []
        for index, (token, logprob) in enumerate(zip(token_ids, own, strict=True)):
            top: tuple[tuple[int, str, float], ...] = ()
            if best is not None:
                ids, values = best.indices[index].tolist(), best.values[index].tolist()
                top = tuple((i, self.write(i), v) for i, v in zip(ids, values, strict=True))
            entries.append(TokenLogprob(token, self.write(token), logprob, top))
        return entries

    def write(self, token: int) -> str:
        """A token's own text."""
        text: str = self._tokenizer.decode(
            [token], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text
