"""Fixtures, grouped by subject; each module documents its own."""

import os
import signal

import pytest
from hypothesis import settings

pytest_plugins = ["fixtures_engines"]

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


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Groups tests for `make test`, which runs two groups at a time: each module is a group, and
    the modules that measure are one.
    """
    for item in items:
        name = item.path.stem.removeprefix("test_")
        is_measure = item.path.parent.name == "integration" and name.startswith(MEASURES)
        item.add_marker(pytest.mark.xdist_group("measures" if is_measure else str(item.path)))
