"""A pytest plugin, `-p benchmarks.shard --shard I/N`: of the collected tests only every N-th.

N processes of it run all of them, where pytest-xdist is not installed. A process in which no test
passed ends with pytest's code for "no tests", all skipped included.
"""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--shard`."""
    parser.addoption("--shard", default="0/1", metavar="I/N", help="tests I, I + N, I + 2 N, ...")


@pytest.hookimpl(trylast=True)  # after what -m and -k leave
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep this process's share."""
    first, step = map(int, str(config.getoption("--shard")).split("/"))
    kept = items[first::step]
    config.hook.pytest_deselected(items=[item for i, item in enumerate(items) if i % step != first])
    items[:] = kept


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Skipped tests prove nothing."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if exitstatus == 0 and not (reporter and reporter.stats.get("passed")):
        session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED
