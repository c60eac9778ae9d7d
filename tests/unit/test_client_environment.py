"""The variables of the client and of the server can be set in the same environment."""

import pytest

from img2img_client.cli.profiles import CONFIG_VARIABLE, PROFILE_VARIABLE
from img2img_server.settings import Settings


def test_the_server_starts_where_the_client_is_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMG2IMG_SERVER", "127.0.0.1:50051")
    monkeypatch.setenv("IMG2IMG_API_KEY", "dev-key")
    monkeypatch.setenv(PROFILE_VARIABLE, "lab")
    monkeypatch.setenv(CONFIG_VARIABLE, "/etc/img2img/config.toml")
    assert Settings.load().grpc_port == 50051
