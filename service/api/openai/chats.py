"""`/v1/chat/completions`: from a request to rows, and from rows to an answer or its chunks."""

from collections.abc import Callable, Sequence

from service.api.openai.call import Call
from service.api.openai.chat_requests import ChatBody
from service.api.openai.chunks import Piece
from service.api.openai.logprobs import build_chat
from service.api.openai.prompts import Row, choose_chat_tokens, render_chat
from service.api.openai.responses import (
    AssistantMessage,
    ChatAnswer,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatLogprobs,
    Delta,
)
from service.inference.completion import Completion, TokenLogprob


def build_chat_rows(call: Call, body: ChatBody) -> list[Row]:
    """The choices of a request.

    Raises:
        ParameterError: the base model's chat template refuses the messages.
    """
    base = call.service.engine.base
    prompt = render_chat(body.messages, base)
    return call.build_rows(
        [prompt],
        max_tokens=body.max_completion_tokens
        or body.max_tokens
        or choose_chat_tokens(prompt, base),
        num_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )


def build_chat_answer(
    call: Call, rows: Sequence[Row], completions: Sequence[Completion]
) -> ChatAnswer:
    """The whole answer."""
    return ChatAnswer(
        **call.head,
        choices=[
            ChatChoice(
                index=row.index,
                message=AssistantMessage(content=completion.text),
                logprobs=_build_logprobs(row, completion.logprobs or ()),
                finish_reason=completion.finish_reason,
            )
            for row, completion in zip(rows, completions, strict=True)
        ],
        usage=call.build_usage(rows, completions),
        icm_lora=call.build_info(completions),
    )


def make_chat_chunks(call: Call) -> Callable[[Piece], ChatChunk]:
    """What makes a chunk of a piece; the first of a choice says who speaks."""

    def build_chunk(piece: Piece) -> ChatChunk:
        if piece.is_first:
            delta = Delta(role="assistant", content=piece.text)
        else:
            delta = Delta(content=piece.text) if piece.text else Delta()
        choice = ChatChunkChoice(
            index=piece.row.index,
            delta=delta,
            logprobs=_build_logprobs(piece.row, piece.tokens),
            finish_reason=piece.finish_reason,
        )
        return ChatChunk(**call.head, object="chat.completion.chunk", choices=[choice])

    return build_chunk


def _build_logprobs(row: Row, tokens: Sequence[TokenLogprob]) -> ChatLogprobs | None:
    return None if row.request.num_logprobs is None else build_chat(tokens)
