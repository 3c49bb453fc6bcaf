"""The quick half of the fault campaign: each row has to meet its bar."""

import pytest
from faults import kills

pytestmark = pytest.mark.slow


def test_kills_and_signals():
    rows = kills.campaign(full=False)
    assert len(rows) == 3
    for fault, bar, figure, passed in rows:
        print(f"{fault}: {figure} ({bar})")
        assert passed, f"{fault}: {figure}"
