"""The drills by name, with the size of their short and their long form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from drill import absence, device, hostile, inputs, redis_away, shards, soak, together, workers
from drill.drill_run import DrillRun, Outcome


@dataclass(frozen=True, slots=True)
class Drill:
    """One drill."""

    name: str
    run: Callable[[DrillRun], Outcome]
    short: tuple[int, int]
    """Jobs a round (a second in `shards`), rounds: what `make test` and `make test-long` run."""
    long: tuple[int, int]
    server: Literal["any", "own", "loads", "sentinels", "cluster"] = "any"
    """The server that it needs: any, one of its own, one that loads its data slowly, sentinels, or a cluster."""
    lasts_s: tuple[float, float] = (0.0, 0.0)
    """Length in seconds of the short and the long form, for drills that have one."""

    @property
    def about(self) -> str:
        """What the drill does, in one sentence."""
        return (self.run.__doc__ or "").partition("\n")[0]


DRILLS = {
    drill.name: drill
    for drill in (
        Drill("kill", workers.kill, short=(300, 1), long=(1000, 100)),
        Drill("loaders", workers.kill_loaders, short=(300, 5), long=(300, 300)),
        Drill("hang", workers.hang, short=(300, 1), long=(1000, 20)),
        Drill("rolling", workers.rolling, short=(200, 3), long=(1000, 10)),
        Drill("redis", redis_away.restart, short=(300, 2), long=(1000, 20), server="own"),
        Drill("cuts", redis_away.cuts, short=(1500, 12), long=(20_000, 300)),
        Drill("hole", absence.hole, short=(200, 1), long=(1000, 3), lasts_s=(8, 45)),
        Drill("away", absence.away, short=(100, 1), long=(500, 1), server="loads", lasts_s=(30, 600)),
        Drill("failover", redis_away.failover, short=(300, 1), long=(1000, 5), server="sentinels"),
        Drill("shards", shards.shards, short=(30, 1), long=(60, 5), server="cluster", lasts_s=(5, 30)),
        Drill("poison", inputs.poison, short=(240, 1), long=(10_000, 1)),
        Drill("hostile", hostile.hostile, short=(400, 1), long=(10_000, 1)),
        Drill("source", inputs.source, short=(60, 1), long=(2000, 1)),
        Drill("encode", device.encode, short=(400, 1), long=(10_000, 1)),
        Drill("duplicates", inputs.duplicates, short=(200, 1), long=(2000, 10)),
        Drill("soak", soak.soak, short=(100, 1), long=(500, 1), lasts_s=(4, 60)),
        Drill("together", together.together, short=(200, 1), long=(500, 1), lasts_s=(12, 600)),
    )
}
