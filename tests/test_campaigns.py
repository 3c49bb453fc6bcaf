"""The quick half of the fault campaigns that need no process of their own; `make faults` runs the whole."""

import importlib

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("name", ["configs", "corpora"])
def test_every_bar_is_met(name):
    rows = importlib.import_module(f"faults.{name}").campaign(full=False)
    assert rows
    assert [row for row in rows if not row[3]] == []


def test_the_table_of_the_campaigns_has_its_place():
    from faults.__main__ import PAGE, TABLE

    assert len(TABLE.findall(PAGE.read_text("utf-8"))) == 1
