"""Prompts as baselines: the base model without adapter, told what to do or shown how.

They make no adapter vector but tokens that stand before every text that is scored, and cost what
these tokens cost at every request: attention over them, and their keys and values in memory.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from service.errors import InvalidInputError
from service.inference.base_model import BaseModel


def prompt_with_description(base: BaseModel, task: str) -> Int[Tensor, " tokens"]:
    """The description in a line of its own.

    Args:
        base: whose tokenizer is used.
        task: the description, as it is given to generators.
    """
    return _tokenize(base, f"{task}\n\n")


def prompt_with_examples(
    base: BaseModel, examples: Sequence[str], max_tokens: int
) -> Int[Tensor, " tokens"]:
    """Examples of the task as documents of a stream, an end-of-text token after each.

    Args:
        base: whose tokenizer is used.
        examples: texts of the task, never of its evaluation data.
        max_tokens: of all together; each example is cut to an equal share.

    Raises:
        InvalidInputError: no examples, or less than two tokens for each.
    """
    share = max_tokens // max(1, len(examples))
    if not examples or share < 2:
        raise InvalidInputError(
            f"{len(examples)} examples in {max_tokens} tokens: give at least one example, and two "
            "tokens for each"
        )
    end = torch.tensor([base.tokenizer.eos_token_id])
    parts = [torch.cat([_tokenize(base, text)[: share - 1], end]) for text in examples]
    return torch.cat(parts)


def _tokenize(base: BaseModel, text: str) -> Int[Tensor, " tokens"]:
    return torch.tensor(base.tokenizer(text, add_special_tokens=False)["input_ids"])
