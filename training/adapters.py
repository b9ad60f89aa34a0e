"""Fine-tuning: one adapter per task on the frozen base, late checkpoints kept."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import Cache, DynamicCache

from service.errors import InvalidTaskDataError
from service.inference.base_model import BaseModel
from service.synthesis.attachment import Attachment, initial_vector
from training.checkpoint import (
    optimizer_tensors,
    read_tensors,
    restore_optimizer,
    write_tensors,
)
from training.recipe import FinetuneSection

StepReport = Callable[[int, float], None]
"""Called after every optimiser step with (steps done, training loss in nats per token)."""

MeasureLoss = Callable[[Tensor], Tensor]
"""Scalar loss of the training examples with the given numbers, under the attached adapter."""


def tokenize_documents(base: BaseModel, documents: Sequence[str]) -> Int[Tensor, " num_tokens"]:
    """All documents as one token stream, an end-of-text token after each."""
    ids: list[int] = []
    for encoded in base.tokenizer(list(documents), add_special_tokens=False)["input_ids"]:
        ids += [*encoded, base.tokenizer.eos_token_id]
    return torch.tensor(ids)


def cut_windows(
    tokens: Int[Tensor, " num_tokens"], num_windows: int, window_tokens: int, seed: int
) -> Int[Tensor, "num_windows window_tokens"]:
    """Draws non-overlapping windows at random, in random order.

    Raises:
        InvalidTaskDataError: the stream holds fewer windows than asked for.
    """
    available = len(tokens) // window_tokens
    if available < num_windows:
        raise InvalidTaskDataError(
            f"{num_windows} windows of {window_tokens} tokens asked for, but the documents hold "
            f"{available}: add text or lower num_windows"
        )
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(available, generator=generator)[:num_windows]
    return tokens[: available * window_tokens].view(available, window_tokens)[chosen]


def measure_nll(
    base: BaseModel,
    windows: Int[Tensor, "batch window_tokens"],
    prefix: Cache | None = None,
) -> Float[Tensor, "batch predicted"]:
    """Negative log-likelihood in nats of every token but the first of each window.

    Args:
        base: the model.
        windows: what is scored.
        prefix: keys and values of tokens that stand before every window, a row for each; it
            grows by the windows.
    """
    windows = windows.to(base.device)
    logits = base.model(
        input_ids=windows, past_key_values=prefix, use_cache=prefix is not None
    ).logits[:, :-1]
    flat = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), windows[:, 1:].flatten(), reduction="none"
    )
    return flat.view(windows.shape[0], -1)


def read_prefix(base: BaseModel, prefix: Int[Tensor, " prefix_tokens"]) -> DynamicCache:
    """Keys and values of a prefix, in one row."""
    cache = DynamicCache(config=base.model.config)
    ids = prefix[None].to(base.device)
    base.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def fine_tune(
    base: BaseModel,
    attachment: Attachment,
    measure_loss: MeasureLoss,
    recipe: FinetuneSection,
    *,
    seed: int,
    state_path: Path,
    report: StepReport,
) -> Float[Tensor, "keep_last num_params"]:
    """Trains one adapter vector with AdamW and returns its late checkpoints.

    The order of examples follows from (seed, epoch) alone, so a run that is killed and resumed
    from `state_path` gives the same bytes as one that is not.

    Args:
        base: frozen base, already wrapped by `attachment`.
        attachment: where the trained vector is put, as the single row for all examples.
        measure_loss: of a batch of the task's `recipe.num_windows` training examples, named by
            their numbers; an epoch passes over each once.
        recipe: steps, learning rate, checkpoints.
        seed: of the initial vector and of the order of examples.
        state_path: resumable state, removed by the caller once the result is safe.
        report: called after every step.
    """
    layout = attachment.layout
    vector = torch.nn.Parameter(initial_vector(layout, seed).to(base.device))
    optimizer = torch.optim.AdamW([vector], lr=recipe.learning_rate, weight_decay=0.0)
    kept: list[Tensor] = []
    first_step = 0
    if state_path.exists():
        tensors, metadata = read_tensors(state_path)
        vector.data.copy_(tensors["vector"])
        restore_optimizer(optimizer, tensors)
        kept = list(tensors["kept"])
        first_step = int(metadata["step"])
    checkpoint_steps = recipe.steps_per_epoch // recipe.checkpoints_per_epoch
    for step in range(first_step, recipe.num_steps):
        epoch, position = divmod(step, recipe.steps_per_epoch)
        order = _epoch_order(recipe.num_windows, seed, epoch)
        batch = order[position * recipe.batch_size :][: recipe.batch_size]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, recipe)
        attachment.rows.vectors = vector[None].to(base.dtype)  # [1, num_params]
        loss = measure_loss(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % checkpoint_steps == 0:
            kept = [*kept, vector.detach().cpu().clone()][-recipe.keep_last :]
            tensors = {"vector": vector, "kept": torch.stack(kept)} | optimizer_tensors(optimizer)
            write_tensors(state_path, tensors, {"step": str(step + 1)})
        report(step + 1, loss.item())
    attachment.rows.vectors = None
    return torch.stack(kept)


def learning_rate_at(step: int, recipe: FinetuneSection) -> float:
    """Linear warm-up, then cosine decay to `final_learning_rate_share` of the peak."""
    warm = min(1.0, (step + 1) / (recipe.warmup_steps + 1))
    progress = step / max(1, recipe.num_steps - 1)
    floor = recipe.final_learning_rate_share
    cosine = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
    return recipe.learning_rate * warm * cosine


def _epoch_order(num_examples: int, seed: int, epoch: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(num_examples, generator=generator)
