"""Where the pieces and the parity of a group's images lie: the arithmetic of stripes.

Layer: inside ``erasure``, beside ``groups``; a position is an index into ``Group.members``. In a group of n = k + m
there are n stripes. Stripe s has its m parity fragments on positions s..s+m-1 and takes one piece from each of the
others, all modulo n: row r of the parity lies on s + r, column j of the data comes from s + m + j. So position i is
data in stripes i+1..i+k, piece p of it in stripe i + 1 + p, where it is column k - 1 - p. Invariants: the fragments of
a stripe are on n different positions; a position holds m parity fragments and gives k pieces; so any m positions may
be lost, whichever they are.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from ckptd.model import Geometry


@dataclass(frozen=True, slots=True)
class Stripes:
    """The stripes of a group. Every piece and parity fragment is ``piece_blocks`` blocks; images are zero-extended."""

    geometry: Geometry
    piece_blocks: int

    @classmethod
    def plan(cls, geometry: Geometry, image_blocks: Sequence[int]) -> Stripes:
        """Pieces long enough for the longest image of the group; ``image_blocks`` are the images' lengths in blocks."""
        return cls(geometry, max(1, -(-max(image_blocks, default=0) // geometry.k)))

    @property
    def n(self) -> int:
        """Positions, and stripes."""
        return sum(self.geometry)

    def parity_of(self, position: int) -> tuple[tuple[int, int], ...]:
        """The m parity fragments that ``position`` holds, as (stripe, row), by row."""
        return tuple(((position - row) % self.n, row) for row in range(self.geometry.m))

    def parity_positions(self, stripe: int) -> tuple[int, ...]:
        """The positions that hold the parity of ``stripe``, by row."""
        return tuple((stripe + row) % self.n for row in range(self.geometry.m))

    def data_of(self, stripe: int) -> tuple[tuple[int, int], ...]:
        """The k pieces in ``stripe``, as (position, piece), by column."""
        k, m = self.geometry
        return tuple(((stripe + m + column) % self.n, k - 1 - column) for column in range(k))

    def stripe_of(self, position: int, piece: int) -> int:
        """The stripe that piece 0..k-1 of the image of ``position`` is in."""
        if not 0 <= piece < self.geometry.k:
            raise ValueError(f"no piece {piece} in {self.geometry}")
        return (position + 1 + piece) % self.n

    def blocks_there(self, image_blocks: int, piece: int) -> int:
        """How much of a piece an image of so many blocks has; the rest is zeros."""
        return max(0, min(self.piece_blocks, image_blocks - piece * self.piece_blocks))

    def column_of(self, stripe: int, position: int) -> int:
        """The fragment that ``position`` has in ``stripe``: data 0..k-1, parity k..k+m-1, as ``Code`` counts."""
        return (position - stripe - self.geometry.m) % self.n

    def extents(self, first_block: int, blocks: int) -> list[tuple[int, int, int]]:
        """The parts of pieces that cover ``blocks`` blocks of an image, as (piece, first block in it, blocks).

        Raises:
            ValueError: the range leaves the k pieces.
        """
        if first_block < 0 or blocks < 0 or first_block + blocks > self.geometry.k * self.piece_blocks:
            raise ValueError(f"blocks {first_block} to {first_block + blocks} of {self}")
        parts = []
        at, end = first_block, first_block + blocks
        while at < end:
            piece, within = divmod(at, self.piece_blocks)
            taken = min(end - at, self.piece_blocks - within)
            parts.append((piece, within, taken))
            at += taken
        return parts

    def recoverable(self, lost_data: Collection[int], lost_parity: Collection[int]) -> bool:
        """Whether every stripe has k fragments when these positions lost their image, these their parity."""
        data, parity = frozenset(lost_data), frozenset(lost_parity)
        return all(
            sum(position in data for position, _ in self.data_of(stripe))
            + sum(position in parity for position in self.parity_positions(stripe))
            <= self.geometry.m
            for stripe in range(self.n)
        )
