"""The overridden private methods of nats-py are unchanged since they were reviewed."""

from __future__ import annotations

import hashlib
import inspect
from pathlib import Path

import pytest
from nats.aio.client import Client

from img2img_server.nats.patched_client import PatchedClient
from tests.readme import ROOT

# Digests for nats-py 2.16.0. The sources of the overrides contain the other private names that they
# use.
EXAMINED: dict[str, str] = {
    "request": "5b1b97e620daed80",
    "close": "e3c4d17ec4ccd54a",
    "_connect_to_server": "1356d992325fde9f",
    "_process_connect_init": "e1ed2da075c82ab0",
    "_process_info": "ecca7bb931308fff",
    "_process_err": "ceb70f44e38fa728",
    "_send_ping": "d57b2f820443afb4",
    "_process_pong": "ee4c4d01a16de074",
    "_process_msg": "6cff75947e97717a",
}
OVERRIDDEN = [
    name
    for name, value in vars(PatchedClient).items()
    if inspect.isfunction(value) and name in vars(Client) and name != "__init__"
]


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_an_overridden_method_has_the_source_that_was_examined(name: str) -> None:
    source = inspect.getsource(getattr(Client, name))
    digest = hashlib.sha256(source.encode()).hexdigest()[:16]
    assert digest == EXAMINED.get(name), (
        f"nats-py's {name} has changed, or is newly overridden: compare it with patched_client.py "
        "and docs/upstream/nats-py.md, and delete the override if it is not needed any more"
    )


def test_only_one_module_overrides_nats_py() -> None:
    package = ROOT / "server" / "img2img_server"
    users = [path for path in package.rglob("*.py") if "(Client)" in path.read_text()]
    assert [path.name for path in users] == ["patched_client.py"]


def test_every_override_is_proposed_upstream() -> None:
    page = Path(ROOT / "docs" / "upstream" / "nats-py.md").read_text()
    assert [name for name in OVERRIDDEN if f"`{name}" not in page] == []
