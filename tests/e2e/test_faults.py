"""The quick half of the fault campaign: each row has to meet its bar."""

import pytest
from faults import kills

pytestmark = pytest.mark.slow


def test_a_save_that_fails_in_one_of_two_processes(tmp_path):
    _, bar, figure, passed = kills.failed_save(kills.Runs(tmp_path, processes=2, undisturbed=False))
    assert passed, f"{figure} ({bar})"


def test_kills_and_signals():
    rows = kills.campaign(full=False)
    assert len(rows) == 3
    for fault, bar, figure, passed in rows:
        print(f"{fault}: {figure} ({bar})")
        assert passed, f"{fault}: {figure}"
