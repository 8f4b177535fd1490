"""Number of ranks along each axis of the mesh: as requested, and as chosen for a step."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Degrees:
    """Sizes of the mesh's axes. Ranks are counted with ulysses fastest, then ring, cfg, dp."""

    dp: int = 1
    cfg: int = 1
    ring: int = 1
    ulysses: int = 1

    @property
    def sp(self) -> int:
        """Number of ranks that share one sequence."""
        return self.ring * self.ulysses

    @property
    def groups(self) -> int:
        """Number of groups of ranks that work on different samples."""
        return self.dp * self.cfg

    @property
    def world_size(self) -> int:
        return self.groups * self.sp

    def __str__(self) -> str:
        return f"ulysses {self.ulysses} × ring {self.ring} × cfg {self.cfg} × dp {self.dp}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestedDegrees:
    """Degrees as requested by the user; 0 is chosen automatically.

    Raises:
        ConfigError: the product of the degrees cannot be `world_size`.
    """

    world_size: int
    dp: int = 0
    cfg: int = 0
    ring: int = 0
    ulysses: int = 0

    def __post_init__(self) -> None:
        if self._fill(cfg=self.cfg or 1, heads=self.world_size) is None and (
            self.cfg or self._fill(cfg=2, heads=self.world_size) is None
        ):
            given = {"dp_degree": self.dp, "cfg_degree": self.cfg, "ring_degree": self.ring}
            given["ulysses_degree"] = self.ulysses
            factors = " × ".join(f"{knob} {value or 'auto'}" for knob, value in given.items())
            raise ConfigError(
                f"{factors}: the product of the degrees must be the number of devices, {self.world_size}"
                " (0 chooses a degree automatically)"
            )

    @property
    def sharing(self) -> int:
        """Number of ranks that share a sequence if cond and uncond run side by side only where required; the same for
        any model."""
        degrees = self._fill(cfg=self.cfg or 1, heads=self.world_size) or self._fill(cfg=2, heads=self.world_size)
        assert degrees is not None, "checked when this was made"
        return degrees.sp

    def choose(self, *, conditions: int, heads: int, sharded: bool = False) -> tuple[Degrees, str]:
        """Chooses the degrees for a step, and returns them with the reason.

        cond and uncond side by side need no communication, so they have priority; then Ulysses, which sends less than a
        ring; a ring only if there are fewer heads than ranks, or on request.

        Args:
            conditions: number of cond and uncond that run in this step.
            heads: attention heads of the model.
            sharded: True if the ranks that share a sequence also share its weights. These ranks must then be the same
                at every step, so cond and uncond run side by side only on request, or if no other degrees fit.
        """
        reasons = []
        side_by_side = None if self.cfg else self._fill(cfg=2, heads=heads)
        if side_by_side and conditions > 1 and not sharded:
            return side_by_side, "auto: positive and negative prompt side by side"
        degrees = self._fill(cfg=self.cfg or 1, heads=heads)
        if degrees is None:
            degrees = side_by_side
            reasons.append("auto: cfg 2, the only one that the other degrees leave")
        elif side_by_side and conditions > 1:
            reasons.append("auto: cond and uncond one after the other, since their ranks share the weights")
        assert degrees is not None, "checked when this was made"
        if 0 in (self.ring, self.ulysses):
            reasons.append(
                "auto: a ring, for there are fewer heads than ranks"
                if degrees.ring > 1 and not self.ring
                else "auto: Ulysses over all ranks of a sequence"
            )
        return degrees, "; ".join(reasons) or "as asked"

    def _fill(self, *, cfg: int, heads: int) -> Degrees | None:
        """Fills in the automatic degrees; returns None if the product cannot be the number of ranks."""
        given = Degrees(dp=self.dp or 1, cfg=cfg, ring=self.ring or 1, ulysses=self.ulysses or 1)
        rest, left = divmod(self.world_size, given.world_size)
        if left or not rest:
            return None
        if not self.ulysses:
            fitting = [d for d in range(1, rest + 1) if rest % d == 0 and (d <= heads or self.ring)]
            given = replace(given, ulysses=max(fitting))
            rest //= given.ulysses
        if not self.ring:
            given, rest = replace(given, ring=rest), 1
        if not self.dp:
            given, rest = replace(given, dp=rest), 1
        return given if rest == 1 else None
