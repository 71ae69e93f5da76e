"""`python -m bench.card.summary FOLDER…`: what the stages have shown, from their JSON files, as Markdown.

First the floors, each as met, missed or not shown; then tables as in docs/performance.md. Of a step that several
folders have, a result that has passed is taken, otherwise the last one. `--released FOLDER` keeps the benchmarks' own
files there, for `python -m bench compare FOLDER`. The exit code is 0 where all floors are met, 1 where not.

Imports the standard library only, because it runs where no wheels are installed too.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from bench.card.floors import Steps, at, floors, ways_of
from bench.card.plan import STAGES

Rows = Sequence[Sequence[str]]
PASSED: Final = frozenset({"ok", "skipped"})
MODELS: Final = ("vit-b-16", "vit-l-14", "siglip")
RELEASED: Final = {"encode": "vit-b-16", "service": "http", "latency": "latency"}
"""File of a benchmark → the step that wrote it."""


def read(folders: Sequence[Path]) -> tuple[dict[str, Mapping[str, Any]], bool]:
    """All steps by name, and whether one of them is a rehearsal."""
    found: dict[str, Mapping[str, Any]] = {}
    is_rehearsal = False
    for folder in folders:
        for stage in STAGES:
            path = folder / f"card-{stage}.json"
            if not path.is_file():
                continue
            content = json.loads(path.read_text(encoding="utf-8"))
            is_rehearsal = is_rehearsal or content["tiny"]
            for name, step in content["steps"].items():
                if step["status"] == "ok" or at(found.get(name), "status") != "ok":
                    found[name] = step
    return found, is_rehearsal


def table(head: Sequence[str], rows: Rows) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def as_text(folders: Sequence[Path]) -> str:
    """The floors alone."""
    steps, is_rehearsal = read(folders)
    rows = [(floor.outcome, floor.name, floor.wanted, floor.found) for floor in floors(steps)]
    warning = "A REHEARSAL: these figures are no measurement.\n\n" if is_rehearsal else ""
    return warning + table(("", "floor", "wanted", "found"), rows)


def as_page(folders: Sequence[Path]) -> str:
    """All: floors, machine, models, service and the ways to run a model."""
    steps, _ = read(folders)
    parts = [as_text(folders), _machine(steps)]
    for head, rows in (_models(steps), _service(steps), _ways(steps)):
        if rows:
            parts.append(table(head, rows))
    failed = [
        f"- {name}: {step['status']} {step.get('reason', '')}".rstrip()
        for name, step in steps.items()
        if step["status"] not in PASSED
    ]
    return "\n\n".join([part for part in parts if part] + (["\n".join(failed)] if failed else []))


def _machine(steps: Steps) -> str:
    facts = at(steps.get("facts"), "figures", "figures")
    if not facts:
        return ""
    machine, versions = at(facts, "machine") or {}, at(facts, "versions") or {}
    gpus = ", ".join(machine.get("gpus") or ["no GPU"])
    return (
        f"{gpus}; {machine.get('cpu')}, {machine.get('cores')} cores; Python {versions.get('python')}, "
        f"torch {at(facts, 'torch', 'version')}, transformers {versions.get('transformers')}."
    )


def _models(steps: Steps) -> tuple[Sequence[str], Rows]:
    rows = [
        (
            name,
            way["mode"],
            str(size["size"]),
            f"{size['batch_ms']:.3g}",
            f"{size['per_second']:,.0f}",
            f"{share:.0%}",
        )
        for name in MODELS
        for way in ways_of(steps, name)
        for size, share in zip(way["rungs"], way["matrix_share"], strict=True)
    ]
    return ("model, FP16", "mode", "batch", "ms a batch", "images/s", "of the matrix rate"), rows


def _service(steps: Steps) -> tuple[Sequence[str], Rows]:
    return ("step", "figure", "value"), [
        (name, headline["name"], f"{headline['value']:,.4g} {headline['unit']}")
        for name, kind in (("http", "service"), ("file", "service"), ("latency", "latency"))
        for headline in (at(steps.get(name), "figures", kind, "headlines") or {}).values()
        if headline["value"] is not None
    ] + [
        ("decoding", name, f"{value:,.0f}")
        for name, value in (at(steps.get("decoding"), "figures", "figures") or {}).items()
        if isinstance(value, int | float)
    ]


def _ways(steps: Steps) -> tuple[Sequence[str], Rows]:
    found = at(steps.get("variants"), "figures", "figures") or {}
    rows = [
        (
            name,
            f"{at(way, 'start_s')} s",
            f"{at(way, 'cosine to FP32, worst')}",
            ", ".join(f"{size}: {rate:,.0f}" for size, rate in (at(way, "images/s") or {}).items()),
        )
        for name, way in found.items()
        if at(way, "images/s")
    ]
    return ("way to run ViT-B/16", "start", "worst cosine to FP32", "images/s by batch size"), rows


def release(folders: Sequence[Path], target: Path) -> Iterator[Path]:
    """Write the benchmarks' own results into a folder.

    Raises:
        ValueError: they are those of a rehearsal.
    """
    steps, is_rehearsal = read(folders)
    if is_rehearsal:
        raise ValueError("expected results of a GPU, got those of a rehearsal")
    target.mkdir(parents=True, exist_ok=True)
    for kind, name in RELEASED.items():
        if content := at(steps.get(name), "figures", kind):
            path = target / f"{kind}.json"
            path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            yield path


def main() -> int:
    """Print the page, and keep the results if asked to."""
    parser = argparse.ArgumentParser(prog="bench.card.summary", description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="where the stages wrote card-*.json")
    parser.add_argument(
        "--released", type=Path, metavar="FOLDER", help="keep results here, such as bench/released/h200"
    )
    asked = parser.parse_args()
    print(as_page(asked.folders))
    if asked.released:
        try:
            for path in release(asked.folders, asked.released):
                print(f"written: {path}", file=sys.stderr)
        except ValueError as error:
            print(error, file=sys.stderr)
            return 2
    return 0 if all(floor.outcome == "met" for floor in floors(read(asked.folders)[0])) else 1


if __name__ == "__main__":
    sys.exit(main())
