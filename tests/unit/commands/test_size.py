"""`shiwu-worker --size`: cores, loaders and memory follow from measured core-milliseconds, rates are estimates."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest
import yaml
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from shiwu_worker.__main__ import main
from shiwu_worker.commands.size import FETCH_CORE_MS, GPU_KINDS, MIN_LOADERS, PICTURES, docs_table, size_of
from tests.support.chart import CHART

ROOT = Path(__file__).resolve().parents[3]
EXAMPLES = {"mig-1g": "h200-mig", "mig-2g": "h200-mig-2g"}
NAMES_OF_ROWS = {"512px": "512 px", "2mp": "2 MP", "12mp": "12 MP"}


def call(*args: str) -> Result:
    """Run the command in this process."""
    return CliRunner().invoke(main, args, catch_exceptions=False)


def test_loaders_follow_from_core_milliseconds() -> None:
    """500 JPEGs of 2 MP a second: 500 · (7.9 + 0.34) ms are 4.1 cores of loaders, and one for the worker's threads."""
    size = size_of(GPU_KINDS["a100"], decode_core_ms=PICTURES["2mp"], rate=500)
    assert (size.gpus, size.loaders, size.cores, size.memory_gib) == (1, 5, 6, 8)


@given(
    card=st.sampled_from(sorted(GPU_KINDS)),
    picture=st.sampled_from(sorted(PICTURES)),
    rate=st.none() | st.floats(0.1, 1e6),
)
def test_size_is_enough_and_not_much_more(card: str, picture: str, rate: float | None) -> None:
    """Loaders keep up with a card's share, one less would not, and no GPU does more than estimated."""
    size = size_of(GPU_KINDS[card], decode_core_ms=PICTURES[picture], rate=rate)
    busy = size.rate_per_gpu * (PICTURES[picture] + FETCH_CORE_MS) / 1000
    assert size.loaders == MIN_LOADERS or size.loaders - 1 <= busy + 1e-6
    assert busy <= size.loaders + 1e-6
    assert size.loaders < size.cores
    assert size.rate_per_gpu <= size.gpu.estimated_rate * (1 + 1e-9)


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan")])
def test_rate_that_is_none_is_refused(rate: float) -> None:
    """Zero loaders would be the answer."""
    with pytest.raises(ValueError, match="above 0"):
        size_of(GPU_KINDS["t4"], decode_core_ms=1.0, rate=rate)


def test_one_card_prints_values_of_the_chart() -> None:
    """And says that no GPU has confirmed the rate."""
    result = call("--size", "--card", "h200", "--picture", "512px", "--rate", "30000")
    assert result.exit_code == 0
    assert "no GPU has confirmed" in result.output
    values = yaml.safe_load(result.output[result.output.index("\nworker:") :])
    size = size_of(GPU_KINDS["h200"], decode_core_ms=PICTURES["512px"], rate=30_000)
    assert values["worker"]["replicas"] == size.gpus == 4
    assert values["worker"]["resources"]["requests"] == {"cpu": str(size.cores), "memory": f"{size.memory_gib}Gi"}


def test_all_cards_are_listed_without_a_choice() -> None:
    """For JPEGs of 2 MP unless another kind is asked for."""
    output = call("--size").output
    assert all(card.title.split()[0] in output for card in GPU_KINDS.values())
    assert output.count("2mp") == 1


@pytest.mark.parametrize("args", ["--card t4", "--rate 3", "--picture 2mp", "--size --tune", "--size --card x"])
def test_wrong_options_are_refused(args: str) -> None:
    """As click refuses what is no option."""
    assert call(*args.split()).exit_code == 2


def test_command_offers_every_card_and_picture() -> None:
    """The names stand there twice, because --help must not import what the calculator needs."""
    choices = {param.name: param.type.choices for param in main.params if isinstance(param.type, click.Choice)}
    assert list(choices["card"]) == list(GPU_KINDS)
    assert list(choices["picture"]) == list(PICTURES)


def test_table_of_the_docs_is_that_of_the_calculator() -> None:
    """Print it with `python -c "from shiwu_worker.commands.size import docs_table; print(docs_table())"`."""
    assert docs_table() in (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")


def test_core_milliseconds_are_the_measured_ones() -> None:
    """Those of docs/performance.md, on the slower machine."""
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    for name, core_ms in PICTURES.items():
        kind = name.partition("-")[0]
        title = f"JPEG {NAMES_OF_ROWS[name]}" if name in NAMES_OF_ROWS else f"{kind} 2 MP"
        [row] = [line for line in text.splitlines() if re.match(rf"\| {title} \|.*\| 1?\d", line, re.IGNORECASE)][:1]
        assert float(row.rstrip("| ").rpartition("|")[2]) == core_ms


@pytest.mark.parametrize("card", sorted(GPU_KINDS))
def test_chart_has_an_example_of_each_gpu(card: str) -> None:
    """With the numbers of the calculator for the kind of images that its first line names."""
    text = (CHART / "examples" / f"{EXAMPLES.get(card, card)}.yaml").read_text(encoding="utf-8")
    [picture] = [name for name, title in NAMES_OF_ROWS.items() if f"JPEGs of {title}" in text.partition("\n")[0]]
    values = yaml.safe_load(text)
    size = size_of(GPU_KINDS[card], decode_core_ms=PICTURES[picture])
    assert "estimate" in text
    assert (values["worker"]["loaders"], values["worker"]["maxBatch"]) == (size.loaders, size.gpu.batch)
    assert values["worker"]["resources"] == {
        "requests": {"cpu": str(size.cores), "memory": f"{size.memory_gib}Gi"},
        "limits": {"memory": f"{size.memory_gib}Gi"},
    }
    assert values["s3"]["client"] == "obstore"


def test_example_for_aws_asks_for_a_gpu_that_aws_has() -> None:
    """A pod whose node selector names no node waits forever: instances of AWS have the A10G and no A10."""
    for path in (CHART / "examples").glob("*.yaml"):
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        if "eks.amazonaws.com/role-arn" in values.get("serviceAccount", {}).get("annotations", {}):
            assert values["worker"]["nodeSelector"]["nvidia.com/gpu.product"] != "NVIDIA-A10", path
