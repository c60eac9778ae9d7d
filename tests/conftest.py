"""Fixtures, grouped by subject; each module documents its own."""

import os
import signal
from pathlib import PurePosixPath
from typing import Any

import pytest
from hypothesis import settings
from xdist.scheduler import LoadScopeScheduling

pytest_plugins = ["fixtures_engines", "fixtures_logs"]

# A shell that starts the tests in the background sets SIGINT to ignored, and nohup SIGHUP. Child
# processes would inherit that, and commands that tests interrupt would not receive the signal.
for number, handler in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)

# Without S3 keys, roles would ask the metadata service of the machine on which the tests run.
os.environ["AWS_EC2_METADATA_DISABLED"] = "true"

# A busy machine must not make a property test fail.
settings.register_profile("img2img", deadline=None)
settings.load_profile("img2img")

# Modules that measure times or memory of several processes; they run one after the other.
MEASURES = (
    "attack",
    "chart_runs",
    "compose_runs",
    "decoder",
    "fanout",
    "fleet",
    "local",
    "loop_lag",
    "nats_cluster",
    "outbound",
    "readme",
    "real",
    "start",
    "streams",
)


def group_of(test: str) -> str:
    """Returns the name of a test's group: its module, or that of all modules that measure."""
    path = PurePosixPath(test.partition("::")[0])
    name = path.stem.removeprefix("test_")
    is_measure = path.parent.name == "integration" and name.startswith(MEASURES)
    return "measures" if is_measure else str(path)


class GroupScheduling(LoadScopeScheduling):  # type: ignore[misc]
    """Runs the tests of a group in one process, one after the other."""

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> GroupScheduling:
    """Returns the scheduler of `make test`, which runs two groups at a time.

    pytest-xdist 3.8 ignores marks of groups with pytest 9.2.
    """
    return GroupScheduling(config, log)
