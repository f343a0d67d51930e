"""Where the tokens of a batch lie: one row each, all text first, then all image, so that either is one block of memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rows:
    """The rows of one batch: `[batch * txt_len + batch * img_len, ...]`.

    Attributes:
        batch: how many pictures.
        txt_len: text tokens of each.
        img_len: image tokens of each, those of references included.
    """

    batch: int
    txt_len: int
    img_len: int

    @property
    def seq_len(self) -> int:
        """Tokens of a picture, text first: what attention sees."""
        return self.txt_len + self.img_len

    @property
    def txt(self) -> int:
        """Rows of text."""
        return self.batch * self.txt_len

    @property
    def count(self) -> int:
        """Rows in all."""
        return self.batch * self.seq_len

    def to_sequences(self, rows: torch.Tensor) -> torch.Tensor:
        """[count, ...] to [B, seq_len, ...]; a view where there is one picture."""
        if self.batch == 1:
            return rows.unsqueeze(0)
        txt = rows[: self.txt].unflatten(0, (self.batch, self.txt_len))
        img = rows[self.txt :].unflatten(0, (self.batch, self.img_len))
        return torch.cat((txt, img), 1)

    def to_rows(self, sequences: torch.Tensor) -> torch.Tensor:
        """[B, seq_len, ...] to [count, ...]; a view where there is one picture."""
        if self.batch == 1:
            return sequences.squeeze(0)
        txt, img = sequences[:, : self.txt_len], sequences[:, self.txt_len :]
        return torch.cat((txt.flatten(0, 1), img.flatten(0, 1)))

    def spread(self, table: torch.Tensor) -> torch.Tensor:
        """A table [2, B, C], for text and for image, to one line a row: [count, C]."""
        txt = table[0, :, None].expand(-1, self.txt_len, -1).flatten(0, 1)
        img = table[1, :, None].expand(-1, self.img_len, -1).flatten(0, 1)
        return torch.cat((txt, img))
