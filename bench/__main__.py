"""`python -m bench [messages|service|all]`: measure, print ratios, write JSON and a PNG to bench/out."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib as mpl

from bench import messages, service

OUT = Path(__file__).parent / "out"


def main() -> None:
    """Run what is asked for; everything by default."""
    asked = sys.argv[1] if len(sys.argv) > 1 else "all"
    if asked not in {"messages", "service", "all"}:
        sys.exit(f"expected messages, service or all, got {asked!r}")
    OUT.mkdir(exist_ok=True)
    rates = messages.run(OUT) if asked in {"messages", "all"} else []
    for rate in rates:
        against = rates[0].per_second / rate.per_second
        print(f"{rate.name:16} {rate.per_second:10.0f} jobs/s    shiwu is {against:5.1f} times as fast")
    result = service.run(OUT) if asked in {"service", "all"} else None
    if result is not None:
        print(f"bare model       {result.bare_per_second:10.0f} pictures/s")
        print(
            f"whole service    {result.service_per_second:10.0f} pictures/s    "
            f"{result.ratio:.2f} of the bare model, mean batch {result.mean_batch:.1f}"
        )
        print("mean ms          " + "  ".join(f"{name} {ms:.1f}" for name, ms in result.stages_ms.items()))
    _draw(rates, result)
    print(f"written to {OUT}")


def _draw(rates: list[messages.Rate], result: service.Service | None) -> None:
    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415 after the choice of the backend

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.5), layout="constrained")
    if rates:
        left.barh([rate.name for rate in rates][::-1], [rate.per_second for rate in rates][::-1])
        left.set_xlabel("jobs/s, one process, model that takes no time")
    if result is not None:
        names = list(result.stages_ms)
        right.barh(names[::-1], [result.stages_ms[name] for name in names][::-1])
        right.set_xlabel(f"mean ms; service = {result.ratio:.2f} of the bare model")
    figure.savefig(OUT / "bench.png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
