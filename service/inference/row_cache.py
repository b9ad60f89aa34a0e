"""Keys and values of running rows, which join and leave between decode steps.

transformers' own caches hold one length for the whole batch: `DynamicCache` pads on the left and
copies everything at every step, `StaticCache` writes all rows at one column, and its continuous
batching flattens the rows into one sequence, where an adapter per row has no place. So this is
its `Cache` with a layer that writes every row at its own position into memory that is there
already; prompts are still read into a `DynamicCache`, which is then taken over.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin

from service.errors import InvalidInputError

COLUMNS_STEP = 128
"""Memory grows by whole multiples of so many tokens."""

MAX_SPARE_ROWS = 16
"""It doubles its rows, but by no more than so many."""


class RowCache(Cache):
    """Keys and values `[rows, heads, tokens, dim]` per layer, for decode steps of one token each.

    A row's tokens lie in the columns 0, 1, ... whatever the other rows hold.

    Args:
        config: of the model.

    Raises:
        InvalidInputError: the model has layers that are no full attention.
    """

    def __init__(self, config: Any) -> None:
        check_attention(config)
        self.lengths: list[int] = []
        self._placed = _Placed()
        self._rows = [_RowLayer(self._placed) for _ in range(config.num_hidden_layers)]
        super().__init__(layers=list(self._rows))

    @property
    def num_rows(self) -> int:
        """Rows that are held."""
        return len(self.lengths)

    def append(self, source: DynamicCache, rows: Sequence[int], lengths: Sequence[int]) -> None:
        """Takes rows of a prompt's cache over, as the last rows.

        Args:
            source: what was read.
            rows: which of its rows.
            lengths: of each, how many of its last tokens.
        """
        self.lengths += lengths
        read: Any
        for layer, read in zip(self._rows, source.layers, strict=True):
            layer.append(read.keys, read.values, rows, self.lengths)

    def remove(self, row: int, *, wipe: bool = False) -> None:
        """Forgets a row; the last row takes its place.

        Args:
            row: which one.
            wipe: it may hold what is not finite, which a mask does not hide from the row that
                gets its memory.
        """
        last = len(self.lengths) - 1
        if wipe:
            for layer in self._rows:
                layer.wipe(row)
        if row != last:
            for layer in self._rows:
                layer.move(last, row, self.lengths[last])
            self.lengths[row] = self.lengths[last]
        self.lengths.pop()

    def begin_step(self) -> tuple[Int[Tensor, "rows 1"], Float[Tensor, "rows 1 1 tokens"]]:
        """Makes room for a token of every row.

        Returns:
            The tokens' positions, and the mask `[rows, 1, 1, tokens]` that is added to the
            scores: made once, where torch would make it of a boolean one in every layer, and
            also where nothing is to be hidden: without a mask transformers lets torch share the
            heads of keys, which takes three times as long on a CPU.
        """
        device = self._rows[0].keys.device
        positions = torch.tensor(self.lengths, device=device)
        self.lengths = [length + 1 for length in self.lengths]
        width = max(self.lengths)
        for layer in self._rows:
            layer.reserve(len(self.lengths), width)
        self._placed.rows = torch.arange(len(self.lengths), device=device)
        self._placed.positions = positions
        self._placed.width = width
        hidden = torch.arange(width, device=device) > positions[:, None]  # [rows, tokens]
        mask = torch.zeros(hidden.shape, dtype=self._rows[0].keys.dtype, device=device)
        mask.masked_fill_(hidden, -torch.inf)
        return positions[:, None], mask[:, None, None]


class _Placed:
    """Where the step's tokens go, the same in every layer."""

    rows: Int[Tensor, " rows"]
    positions: Int[Tensor, " rows"]
    width: int = 0


class _RowLayer(CacheLayerMixin):
    """One layer of a `RowCache`; `keys` and `values` have room for more rows and tokens."""

    keys: Tensor
    values: Tensor

    def __init__(self, placed: _Placed) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._placed = placed

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Takes shape and dtype from the first prompts' `[rows, heads, tokens, dim]`."""
        for name, states in (("keys", key_states), ("values", value_states)):
            _, heads, _, dim = states.shape
            setattr(self, name, states.new_zeros(0, heads, 0, dim))
        self.is_initialized = True

    def append(
        self,
        keys: Float[Tensor, "source heads tokens dim"],
        values: Float[Tensor, "source heads tokens dim"],
        rows: Sequence[int],
        lengths: Sequence[int],
    ) -> None:
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        self.reserve(len(lengths), max(lengths))
        first = len(lengths) - len(rows)
        for row, source in enumerate(rows, first):
            length = lengths[row]
            self.keys[row, :, :length] = keys[source, :, -length:]
            self.values[row, :, :length] = values[source, :, -length:]

    def wipe(self, row: int) -> None:
        self.keys[row].zero_()
        self.values[row].zero_()

    def move(self, source: int, target: int, length: int) -> None:
        for states in (self.keys, self.values):
            states[target, :, :length] = states[source, :, :length]

    def reserve(self, rows: int, columns: int) -> None:
        """Grows the memory where it does not hold so much; zeros, as a mask may not meet NaN."""
        have_rows, heads, have_columns, _ = self.keys.shape
        if rows <= have_rows and columns <= have_columns:
            return
        if rows > have_rows:  # rows that join one by one do not copy all others every time
            rows = max(rows, have_rows + min(have_rows, MAX_SPARE_ROWS))
        else:
            rows = have_rows
        columns = max(-(-columns // COLUMNS_STEP) * COLUMNS_STEP, have_columns)
        for name in ("keys", "values"):
            old: Tensor = getattr(self, name)
            new = old.new_zeros(rows, heads, columns, old.shape[-1])
            new[:have_rows, :, :have_columns] = old
            setattr(self, name, new)

    def update(
        self,
        key_states: Float[Tensor, "rows heads 1 dim"],
        value_states: Float[Tensor, "rows heads 1 dim"],
        *_: Any,
        **__: Any,
    ) -> tuple[Tensor, Tensor]:
        """Writes the step's token of every row; returns all that is held."""
        placed, num_rows = self._placed, key_states.shape[0]
        if num_rows == 1:  # a fifth of the time that an indexed write takes
            self.keys[0, :, placed.width - 1] = key_states[0, :, 0]
            self.values[0, :, placed.width - 1] = value_states[0, :, 0]
        else:
            self.keys[placed.rows, :, placed.positions] = key_states[:, :, 0]
            self.values[placed.rows, :, placed.positions] = value_states[:, :, 0]
        return (
            self.keys[:num_rows, :, : placed.width],
            self.values[:num_rows, :, : placed.width],
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Tokens held after the step; our mask is made already."""
        return self._placed.width, 0

    def get_seq_length(self) -> int:
        """Tokens of the longest row."""
        return self._placed.width

    def get_max_length(self) -> int:
        """None."""
        return -1


def check_attention(config: Any) -> None:
    """Raises `InvalidInputError` for a model whose layers are not all full attention."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"} or getattr(config, "sliding_window", None):
        raise InvalidInputError(
            "this base model has attention over a sliding window or linear attention, which "
            "batches of joining rows do not hold yet: choose a base with full attention"
        )
