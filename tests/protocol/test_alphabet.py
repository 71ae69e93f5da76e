"""Every script and every key of the contract is in the explorer: a new one makes a test fail until it is placed."""

from __future__ import annotations

from pathlib import Path

from shiwu.contract import ANSWERED_CHANNEL, keys
from tests.protocol.defects import DEFECTS
from tests.protocol.outside_steps import SPOILED
from tests.protocol.simulated_redis import SOURCES, TIME_CALL
from tests.protocol.snapshot import PREFIXES, TYPES
from tests.protocol.steps import STEPS

ROOT = Path(__file__).resolve().parents[2]
CHANNELS = {ANSWERED_CHANNEL}
"""Names that are no keys."""
EXTENSIONS = ("shiwu:backfill", "shiwu:hooks:", "shiwu:watch:")
"""Keys of extensions. The explorer runs none: they enqueue and read as any client, and change no key of a job."""
EXTENSION_SCRIPTS = {"backfill", "hooks", "migration", "watch"}
"""Folders of extensions with scripts, and of what runs while no worker does."""


def test_every_script_belongs_to_a_step() -> None:
    """A script that no step runs is not explored; name it at the step that runs it."""
    placed = {script for step in STEPS.values() for script in step.scripts}
    paths = [path for side in ("producer", "worker") for path in (ROOT / side).rglob("*.lua")]
    files = {path.name for path in paths if path.parent.parent.name not in EXTENSION_SCRIPTS}
    assert files == SOURCES.keys() == placed


def test_every_key_is_read_by_the_explorer() -> None:
    """A key that the snapshot does not know would be reported as foreign to the contract."""
    names = {value for name, value in vars(keys).items() if name.isupper() and isinstance(value, str)}
    own = {name for name in names if not name.startswith(EXTENSIONS)}
    assert own - TYPES.keys() - PREFIXES.keys() == CHANNELS
    assert keys.done_key("") in PREFIXES
    assert keys.result_key("") in PREFIXES


def test_every_key_may_have_a_wrong_type() -> None:
    """Each key of the contract is among those that another program may write."""
    assert TYPES.keys() <= set(SPOILED)


def test_scripts_read_the_clock_in_one_way() -> None:
    """The explorer replaces it by its text."""
    assert [name for name, source in SOURCES.items() if source.count("TIME'") != source.count(TIME_CALL)] == []


def test_every_defect_is_in_its_script() -> None:
    """A guard that was rewritten needs its defect rewritten."""
    assert [what for what, (script, old, _) in DEFECTS.items() if old not in SOURCES[script]] == []
