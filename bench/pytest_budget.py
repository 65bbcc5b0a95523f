"""Tests within a time: `pytest -p bench.pytest_budget --budget SECONDS --rounds N`.

With rounds a share of every file comes first, then another one. What the time does not suffice for is skipped, and
counted as that.
"""

import time
from itertools import groupby
from math import inf

import pytest

DEADLINE = pytest.StashKey[float]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--budget", type=float, default=inf, metavar="SECONDS", help="begin no test after so long")
    parser.addoption("--rounds", type=int, default=1, metavar="N", help="each file's tests are spread over")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[DEADLINE] = time.monotonic() + config.getoption("--budget")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of N rounds the i-th holds every N-th test of each file, from its i-th on."""
    rounds = config.getoption("--rounds")
    files = [list(tests) for _, tests in groupby(items, key=lambda item: item.path)]
    items[:] = [item for start in range(rounds) for tests in files for item in tests[start::rounds]]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if time.monotonic() > item.config.stash[DEADLINE]:
        pytest.skip("the budget was spent")
