"""Prompts of the OpenAI routes: text, tokens, or a chat in the base model's own template."""

from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import TemplateError

from service.api.openai.chat_requests import DEFAULT_CHAT_TOKENS, Message
from service.api.openai.errors import ParameterError, UnsupportedParameterError
from service.inference.base_model import BaseModel
from service.inference.completion import CompletionRequest


@dataclass(frozen=True)
class Prompt:
    """What is continued.

    Attributes:
        content: text or tokens.
        text: the same as text, for `echo`.
    """

    content: str | tuple[int, ...]
    text: str


@dataclass(frozen=True, eq=False)
class Row:
    """One choice to be answered.

    Attributes:
        index: of the choice.
        prompt: number of its prompt among those of the request.
        echo: text that the choice begins with; empty without `echo`.
        request: what the engine is asked.
    """

    index: int
    prompt: int
    echo: str
    request: CompletionRequest


def read_prompt(content: str | tuple[int, ...], base: BaseModel) -> Prompt:
    """A prompt, its tokens checked.

    Raises:
        ParameterError: a token is none of the base model's.
    """
    if isinstance(content, str):
        return Prompt(content, content)
    size = len(base.tokenizer)
    if max(content) >= size:
        raise ParameterError(
            f"token {max(content)} is not in the base model's vocabulary of {size}: "
            "use the base model's tokenizer",
            "prompt",
        )
    text: str = base.tokenizer.decode(
        list(content), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    return Prompt(content, text)


def render_chat(messages: Sequence[Message], base: BaseModel) -> Prompt:
    """A chat as the base model was taught to read it, up to where the answer begins.

    Raises:
        UnsupportedParameterError: the base model has no chat template.
        ParameterError: its template refuses these messages.
    """
    if not base.tokenizer.chat_template:
        raise UnsupportedParameterError(
            "the base model has no chat template: use /v1/completions", "messages"
        )
    turns = [
        {
            "role": "system" if message.role == "developer" else message.role,
            "content": message.text,
        }
        for message in messages
    ]
    try:
        text: str = base.tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True
        )
    except TemplateError as error:
        raise ParameterError(f"the base model's chat template refuses: {error}", "messages") from (
            error
        )
    ids = base.tokenizer(text, add_special_tokens=False)["input_ids"]
    return Prompt(tuple(ids), text)


def choose_chat_tokens(prompt: Prompt, base: BaseModel) -> int:
    """Most tokens of an answer where the request does not say: what the context has left."""
    context: int | None = getattr(base.model.config, "max_position_embeddings", None)
    if context is None:
        return DEFAULT_CHAT_TOKENS
    return max(1, min(DEFAULT_CHAT_TOKENS, context - len(prompt.content)))
