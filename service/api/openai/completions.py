"""`/v1/completions`: from a request to rows, and from rows to an answer or its chunks."""

from collections.abc import Callable, Sequence

from service.api.openai.call import Call
from service.api.openai.chunks import Piece
from service.api.openai.logprobs import TokenPlaces, build_legacy
from service.api.openai.prompts import Row, read_prompt
from service.api.openai.requests import DEFAULT_COMPLETION_TOKENS, CompletionBody
from service.api.openai.responses import CompletionAnswer, CompletionChoice, LegacyLogprobs
from service.inference.completion import Completion, TokenLogprob


def build_completion_rows(call: Call, body: CompletionBody) -> list[Row]:
    """The choices of a request.

    Raises:
        ParameterError: a prompt holds a token that the base does not have.
    """
    base = call.service.engine.base
    return call.build_rows(
        [read_prompt(content, base) for content in body.prompts],
        max_tokens=DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens,
        num_logprobs=body.logprobs,
        echo=bool(body.echo),
    )


def build_completion_answer(
    call: Call, rows: Sequence[Row], completions: Sequence[Completion]
) -> CompletionAnswer:
    """The whole answer."""
    choices = []
    for row, completion in zip(rows, completions, strict=True):
        text = row.echo + completion.text
        tokens = (*(completion.prompt_logprobs or ()), *(completion.logprobs or ()))
        choice = CompletionChoice(
            index=row.index,
            text=text,
            logprobs=_build_logprobs(row, tokens, text, TokenPlaces()),
            finish_reason=completion.finish_reason,
        )
        choices.append(choice)
    return CompletionAnswer(
        **call.head,
        choices=choices,
        usage=call.build_usage(rows, completions),
        icm_lora=call.build_info(completions),
    )


def make_completion_chunks(call: Call, rows: Sequence[Row]) -> Callable[[Piece], CompletionAnswer]:
    """What makes a chunk of a piece; it remembers how far each choice's text has come."""
    places = {row.index: TokenPlaces() for row in rows}

    def build_chunk(piece: Piece) -> CompletionAnswer:
        row = piece.row
        choice = CompletionChoice(
            index=row.index,
            text=piece.text,
            logprobs=_build_logprobs(row, piece.tokens, piece.text, places[row.index]),
            finish_reason=piece.finish_reason,
        )
        return CompletionAnswer(**call.head, object="text_completion", choices=[choice])

    return build_chunk


def _build_logprobs(
    row: Row, tokens: Sequence[TokenLogprob], text: str, places: TokenPlaces
) -> LegacyLogprobs | None:
    if row.request.num_logprobs is None:
        return None
    return build_legacy(tokens, text, places, row.request.num_logprobs)
