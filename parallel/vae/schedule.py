"""Assignment of tiles to ranks while a VAE runs."""

from __future__ import annotations

from collections.abc import Sequence

_AHEAD = 2
"""Number of tiles assigned to a rank at once: the current one and the next, so that it never waits for the host."""


class Schedule:
    """Dynamic assignment of independent tiles to ranks while they are computed.

    Each tile is assigned to the rank that is expected to finish it first, from costs and speeds. This balances cheap
    tiles at the edges and unequal devices, and near the end a slow rank does not take a tile that a fast rank would
    finish sooner. Tiles start in order, because they are blended in order, and a rank that has run out of memory gets
    no tile of that cost or above again.

    Args:
        costs: cost of each tile, in any unit.
        speeds: speed of each rank, relative to the others; replaced by measured speeds as tiles are finished.
        window: number of tiles that may be assigned, counted from the first tile that has not been blended.
    """

    def __init__(self, costs: Sequence[float], speeds: Sequence[float], window: int):
        self._costs = list(costs)
        self._given = list(speeds)
        self._window = window
        self._waiting = list(range(len(costs)))
        self._backlog: list[list[int]] = [[] for _ in speeds]
        self._done: list[tuple[float, float]] = [(0.0, 0.0)] * len(speeds)
        self._limit = [float("inf")] * len(speeds)

    def next(self, blended: int) -> tuple[int, int] | None:
        """Assigns the next tile; returns the tile and its rank, or None if no tile can be assigned now.

        Args:
            blended: number of tiles that have been blended, in order from the first.
        """
        speeds = self._speeds()
        for tile in self._waiting:
            if tile >= blended + self._window:
                return None
            cost = self._costs[tile]
            able = [rank for rank in range(len(speeds)) if cost < self._limit[rank]]
            if not able:
                continue
            finish = {rank: (sum(self._costs[i] for i in self._backlog[rank]) + cost) / speeds[rank] for rank in able}
            rank = min(able, key=lambda r: (finish[r], r))
            if len(self._backlog[rank]) < _AHEAD:
                self._waiting.remove(tile)
                self._backlog[rank].append(tile)
                return tile, rank
            if len(able) == len(speeds):
                return None  # its rank is busy; a later tile would only finish early and wait for this one
        return None

    def finished(self, tile: int, rank: int, seconds: float) -> None:
        self._backlog[rank].remove(tile)
        cost, time = self._done[rank]
        self._done[rank] = (cost + self._costs[tile], time + seconds)

    def out_of_memory(self, tile: int, rank: int) -> bool:
        """Puts a tile back after `rank` ran out of memory on it. Returns whether another rank may still compute it."""
        self._backlog[rank].remove(tile)
        self._limit[rank] = min(self._limit[rank], self._costs[tile])
        self._waiting = sorted([*self._waiting, tile])
        return any(self._costs[tile] < limit for limit in self._limit)

    def _speeds(self) -> list[float]:
        """Returns each rank's measured cost per second, estimated from `speeds` for a rank without a finished tile."""
        measured = {rank: cost / time for rank, (cost, time) in enumerate(self._done) if time > 0}
        if not measured:
            return self._given
        unit = sum(measured.values()) / sum(self._given[rank] for rank in measured)
        return [measured.get(rank, given * unit) for rank, given in enumerate(self._given)]
