"""Fixtures by subject; each file says what it offers."""

import os
import signal

pytest_plugins = ["fixtures_engines"]

# A shell that starts us in the background has SIGINT ignored, and what we start would inherit that:
# commands that tests interrupt would not receive it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Roles without S3 keys would ask the metadata service of the machine that runs the tests.
os.environ["AWS_EC2_METADATA_DISABLED"] = "true"
