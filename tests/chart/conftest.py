"""The chart's helms, as fixtures."""

from __future__ import annotations

import pytest

from tests.support.chart import Helm, tool
from tests.support.chart_tools import HELMS


@pytest.fixture(params=list(HELMS))
def helm(request: pytest.FixtureRequest) -> Helm:
    """One of both helms."""
    return Helm(tool(request.param))


@pytest.fixture
def newest() -> Helm:
    """The newer one, where one is enough."""
    return Helm(tool("helm4"))
