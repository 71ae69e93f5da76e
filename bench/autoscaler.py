"""A model of KEDA and its HPA, which decide how many workers run, from the chart's own ScaledObject.

Keys, formula, target, bounds and windows come from the rendered object. The rest comes from Kubernetes' documentation:
the HPA's rounds, its tolerance, and how quickly it may grow.
"""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import redis

COUNT: Final = """
local kind = redis.call('TYPE', KEYS[1]).ok
local how = {list = 'LLEN', hash = 'HLEN', zset = 'ZCARD', set = 'SCARD'}
return how[kind] and redis.call(how[kind], KEYS[1]) or 0
"""
"""Counts as KEDA's Redis scaler does: by the type of the key; a missing key is 0."""
TOLERANCE: Final = 0.1
"""Below this difference from the target an HPA changes nothing."""
GROWS_BY: Final = 4
GROWS_TIMES: Final = 2
"""In one round an HPA at most doubles the pods, or adds four."""


@dataclass(frozen=True, slots=True)
class Rules:
    """The settings of a ScaledObject."""

    keys: tuple[tuple[str, str], ...]
    """(name in the formula, key in Redis)."""
    formula: str
    target: float
    activation: float
    least: int
    most: int
    poll_s: float
    cooldown_s: float
    window_s: float
    """How far back scaling down looks, in seconds."""

    @classmethod
    def read(cls, scaled: Mapping[str, Any]) -> Rules:
        """Read a rendered ScaledObject.

        Raises:
            ValueError: the formula is no sum of its triggers.
        """
        spec = scaled["spec"]
        modifiers = spec["advanced"]["scalingModifiers"]
        behavior = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
        keys = tuple((trigger["name"], trigger["metadata"]["listName"]) for trigger in spec["triggers"])
        formula = modifiers["formula"]
        if set(re.findall(r"[a-z]\w*", formula)) != {name for name, _ in keys} or re.search(r"[^\w\s()+*]", formula):
            raise ValueError(f"expected a sum of {', '.join(name for name, _ in keys)}, got {formula!r}")
        if modifiers["metricType"] != "AverageValue":
            raise ValueError(f"expected metricType AverageValue, got {modifiers['metricType']!r}")
        return cls(
            keys=keys,
            formula=formula,
            target=float(modifiers["target"]),
            activation=float(modifiers["activationTarget"]),
            least=int(spec["minReplicaCount"]),
            most=int(spec["maxReplicaCount"]),
            poll_s=float(spec["pollingInterval"]),
            cooldown_s=float(spec["cooldownPeriod"]),
            window_s=float(behavior["scaleDown"]["stabilizationWindowSeconds"]),
        )

    def metric(self, client: redis.Redis) -> float:
        """Return the current value of the formula."""
        with client.pipeline(transaction=False) as pipe:
            for _, key in self.keys:
                pipe.eval(COUNT, 1, key)
            counts: list[Any] = pipe.execute()
        names = {name: int(count) for (name, _), count in zip(self.keys, counts, strict=True)}
        # `read` lets only sums and products of these names through.
        return float(eval(self.formula, {"__builtins__": {}}, names))  # noqa: S307 the formula of the chart, with no names but its own


@dataclass(slots=True)
class Autoscaler:
    """Decides at each of KEDA's polls how many workers there should be.

    Args:
        sync_s: between two rounds of the HPA, 15 s on a cluster.
    """

    rules: Rules
    sync_s: float
    wanted: int = 0
    _active_s: float = -math.inf
    _synced_s: float = -math.inf
    _advice: deque[tuple[float, int]] = field(default_factory=deque)

    def decide(self, metric: float, *, now_s: float) -> int:
        """Return the number of workers: KEDA moves between none and one, the HPA above that."""
        rules = self.rules
        is_active = metric > rules.activation
        if is_active:
            self._active_s = now_s
        if self.wanted == 0:
            if is_active:
                self.wanted, self._synced_s = max(1, rules.least), now_s
            return self.wanted
        if not is_active and rules.least == 0 and now_s - self._active_s >= rules.cooldown_s:
            self.wanted = 0
            self._advice.clear()
        elif now_s - self._synced_s >= self.sync_s:
            self._synced_s = now_s
            self.wanted = self._sync(metric, now_s=now_s)
        return self.wanted

    def _sync(self, metric: float, *, now_s: float) -> int:
        rules = self.rules
        use = metric / (rules.target * self.wanted)
        asked = self.wanted if abs(use - 1) <= TOLERANCE else math.ceil(metric / rules.target)
        asked = min(max(asked, 1, rules.least), rules.most)
        self._advice.append((now_s, asked))
        while now_s - self._advice[0][0] > rules.window_s:
            self._advice.popleft()
        if asked > self.wanted:
            return min(asked, max(self.wanted * GROWS_TIMES, self.wanted + GROWS_BY))
        return min(self.wanted, max(advice for _, advice in self._advice))
