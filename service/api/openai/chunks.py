"""A streamed answer in pieces, the same for completions and chats."""

from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from service.api.openai.call import Call
from service.api.openai.generation import RowItem, RowStream
from service.api.openai.prompts import Row
from service.api.openai.responses import ChatChunk, CompletionAnswer
from service.inference.completion import Completion, FinishReason, TokenLogprob

ChunkT = TypeVar("ChunkT", CompletionAnswer, ChatChunk)


@dataclass(frozen=True)
class Piece:
    """What one choice grew by.

    Attributes:
        row: of the choice.
        text: new; with the echo where it is the first.
        tokens: that came with it, where log-probabilities were asked for.
        is_first: of its choice.
        finish_reason: of the last one.
    """

    row: Row
    text: str
    tokens: Sequence[TokenLogprob]
    is_first: bool
    finish_reason: FinishReason | None = None


@dataclass
class _Progress:
    """How far a choice has been sent."""

    num_characters: int = 0
    num_tokens: int = 0
    is_first: bool = field(default=True)

    def cut(self, item: RowItem) -> Piece:
        """What is new in an item; whatever no delta held comes with the completion."""
        row, content = item
        if isinstance(content, Completion):
            text = content.text[self.num_characters :]
            tokens = (*(content.prompt_logprobs or ()), *(content.logprobs or ()))
            if not self.is_first:
                tokens = (content.logprobs or ())[self.num_tokens :]
            reason = content.finish_reason
        else:
            text, tokens, reason = content.text, content.logprobs, None
        piece = Piece(
            row, row.echo + text if self.is_first else text, tokens, self.is_first, reason
        )
        self.num_characters += len(text)
        self.num_tokens += len(tokens)
        self.is_first = False
        return piece


async def stream_chunks(
    call: Call,
    rows: Sequence[Row],
    first: RowItem,
    rest: RowStream,
    build_chunk: Callable[[Piece], ChunkT],
) -> AsyncGenerator[ChunkT, None]:
    """All chunks of an answer; the last one tells what answered.

    Args:
        call: what is answered.
        rows: its choices.
        first: what came first of them.
        rest: what comes after.
        build_chunk: makes a chunk of one choice.
    """
    progress = {row: _Progress() for row in rows}
    done: dict[Row, Completion] = {}
    item: RowItem | None = first
    while item is not None:
        row, content = item
        chunk = build_chunk(progress[row].cut(item))
        if isinstance(content, Completion):
            done[row] = content
        is_last = len(done) == len(rows)
        if call.body.includes_usage:
            chunk.usage = None
        elif is_last:
            chunk.icm_lora = call.build_info([done[row] for row in rows])
        yield chunk
        item = await anext(rest, None)
    if call.body.includes_usage:
        completions = [done[row] for row in rows]
        end = chunk.model_copy(update={"choices": []})
        end.usage = call.build_usage(rows, completions)
        end.icm_lora = call.build_info(completions)
        yield end
