"""What a layer remembers of the attention its tokens got."""

from collections.abc import Callable

import torch
from torch import Tensor

from .store import compact


class AttentionHistory:
    """Rows `[batch, kv_heads, rows, tokens]`, one per query, of the newest `window` queries; or their sum.

    window: None keeps the sum over all queries in a single row.
    """

    def __init__(self, window: int | None) -> None:
        self.window = window
        self.rows: Tensor | None = None
        self.queries = 0
        """Tokens that there were at the newest row's query, itself included."""

    def add(self, rows: Tensor, queries: int) -> None:
        """Remember rows `[batch, kv_heads, n, queries]`, the last of which is that of token `queries - 1`.

        Where a query is told again, by another layer that borrows these keys and values, the larger number counts.
        """
        newest = max(queries, self.queries)
        rows = torch.nn.functional.pad(rows, (0, newest - rows.shape[-1]))
        held = None if self.rows is None else torch.nn.functional.pad(self.rows, (0, newest - self.rows.shape[-1]))
        if self.window is None:
            rows = rows.sum(2, keepdim=True)
            rows = rows if held is None else rows + held
        elif held is not None and queries - rows.shape[2] <= self.queries:
            first = min(queries - rows.shape[2], self.queries - held.shape[2])
            rows, held = (
                torch.nn.functional.pad(each, (0, 0, last - each.shape[2] - first, newest - last))
                for each, last in ((rows, queries), (held, self.queries))
            )
            rows = torch.maximum(rows, held)
        self.rows = compact(rows if self.window is None else rows[:, :, -self.window :])
        self.queries = newest

    def read(self, tokens: int) -> Tensor | None:
        """Rows `[batch, kv_heads, rows, tokens]`, now that there are `tokens`; None where the newest query went unseen.

        Of a sum, queries that went unseen are missing.
        """
        if self.rows is None or (self.window is not None and self.queries != tokens):
            return None
        return torch.nn.functional.pad(self.rows, (0, tokens - self.rows.shape[-1]))

    def forget(self, rows: int) -> None:
        """Keep the newest `rows` rows; a sum is kept as it is."""
        if self.window is not None and self.rows is not None:
            self.rows = compact(self.rows[:, :, -rows:]) if rows else None

    def truncate(self, tokens: int) -> None:
        """Forget the queries and keys from `tokens` on. What they added to a sum stays in it."""
        if tokens >= self.queries:
            return
        if self.rows is not None:
            kept = self.rows.shape[2] if self.window is None else self.rows.shape[2] - (self.queries - tokens)
            self.rows = compact(self.rows[:, :, :kept, :tokens]) if kept > 0 and tokens else None
        self.queries = tokens

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply a change of the batch dimension."""
        self.rows = None if self.rows is None else compact(change(self.rows))

    def held_bytes(self) -> int:
        """Bytes of the storage."""
        return 0 if self.rows is None else self.rows.untyped_storage().nbytes()
