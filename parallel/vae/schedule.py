"""Which rank computes which tile next."""

from __future__ import annotations

from collections.abc import Sequence

_AHEAD = 2
"""Tiles that a rank is given at once: one to compute, and the next one, so that it never waits for the host."""


class Schedule:
    """Tiles that do not depend on each other, handed out while they are computed.

    A tile goes to the rank that will have finished it first, as far as costs and speeds tell: cheap tiles at the edges
    and unequal devices even out, and near the end a slow rank does not take what a fast one would finish sooner. Tiles
    start in their order, because they are blended in it, and a rank that has run out of memory gets no tile of that
    cost again.

    Args:
        costs: of each tile, in any unit.
        speeds: of each rank, relative to the others; measured ones take their place as tiles are finished.
        window: how many tiles may be handed out beyond the first that has not been blended.
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
        """The next tile to hand out and its rank; None for now.

        Args:
            blended: tiles, the first ones, that have been taken out.
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
                return None  # its rank is busy; a tile after it would only be finished sooner to wait for it
        return None

    def finished(self, tile: int, rank: int, seconds: float) -> None:
        self._backlog[rank].remove(tile)
        cost, time = self._done[rank]
        self._done[rank] = (cost + self._costs[tile], time + seconds)

    def out_of_memory(self, tile: int, rank: int) -> bool:
        """Takes the tile back. Returns whether another rank may still compute it."""
        self._backlog[rank].remove(tile)
        self._limit[rank] = min(self._limit[rank], self._costs[tile])
        self._waiting = sorted([*self._waiting, tile])
        return any(self._costs[tile] < limit for limit in self._limit)

    def _speeds(self) -> list[float]:
        """Cost per second where a rank has finished tiles; others in proportion to what was given."""
        measured = {rank: cost / time for rank, (cost, time) in enumerate(self._done) if time > 0}
        if not measured:
            return self._given
        unit = sum(measured.values()) / sum(self._given[rank] for rank in measured)
        return [measured.get(rank, given * unit) for rank, given in enumerate(self._given)]
