"""Fixtures, grouped by subject; each module documents its own."""

import os
import signal

from hypothesis import settings

pytest_plugins = ["fixtures_engines"]

# A shell that starts the tests in the background sets SIGINT to ignored. Child processes would
# inherit that, and commands that tests interrupt would not receive the signal.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Without S3 keys, roles would ask the metadata service of the machine on which the tests run.
os.environ["AWS_EC2_METADATA_DISABLED"] = "true"

# A busy machine must not make a property test fail.
settings.register_profile("img2img", deadline=None)
settings.load_profile("img2img")
