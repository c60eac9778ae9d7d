"""Settings report every mistake at once and hide secrets."""

import asyncio

import pytest
from pydantic import ValidationError

from benchmarks.local_stack import free_port
from img2img_server.api.keys import load_keys
from img2img_server.errors import UnavailableError
from img2img_server.gateway.server import serve
from img2img_server.nats.bus import connect_bus
from img2img_server.settings import Settings, SettingsError
from img2img_server.testing.memory_blobs import MemoryBlobStore


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in [name for name in os.environ if name.upper().startswith("IMG2IMG_")]:
        monkeypatch.delenv(name)


def test_a_setting_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMG2IMG_GRPC_PORT", "1234")
    assert Settings.load().grpc_port == 1234


def test_every_mistake_is_reported_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMG2IMG_GRPC_PORT", "eighty")
    monkeypatch.setenv("IMG2IMG_LOG_LEVEL", "loud")
    monkeypatch.setenv("IMG2IMG_GRPCPORT", "1")
    with pytest.raises(SettingsError) as caught:
        Settings.load()
    text = str(caught.value)
    assert "IMG2IMG_GRPCPORT: there is no such setting" in text
    assert "IMG2IMG_GRPC_PORT: " in text
    assert "IMG2IMG_LOG_LEVEL: " in text


@pytest.mark.parametrize("name", ["default_guidance_scale", "default_strength"])
def test_a_default_that_no_request_may_have_is_refused(name: str) -> None:
    for value in (-1, 0, 0.5):
        assert getattr(Settings.model_validate({name: value}), name) == value
    with pytest.raises(ValidationError, match="must be -1, for the model's own, or at least 0"):
        Settings.model_validate({name: -0.5})


def test_one_half_of_a_tls_pair_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMG2IMG_TLS_CERT_FILE", "/tmp/cert.pem")
    with pytest.raises(SettingsError, match="must be given together"):
        Settings.load()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "gpu-box"])
async def test_the_development_key_opens_no_server_to_the_network(host: str) -> None:
    settings = Settings(dev_key=True, grpc_host=host, http_host=host, metrics_port=0)
    with pytest.raises(SettingsError, match="refusing to listen"):
        load_keys(settings)
    with pytest.raises(SettingsError, match="refusing to listen"):
        await serve(settings, MemoryBlobStore(), asyncio.Event())


def test_secrets_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMG2IMG_S3_ACCESS_KEY", "a-key")
    monkeypatch.setenv("IMG2IMG_S3_SECRET_KEY", "do-not-show")
    monkeypatch.setenv("IMG2IMG_S3_SESSION_TOKEN", "nor-that-one")
    monkeypatch.setenv("IMG2IMG_WEBHOOK_SECRET", "neither-this")
    monkeypatch.setenv("IMG2IMG_NATS_URL", "nats://user:password-too@127.0.0.1:1")
    text = repr(Settings.load())
    assert "password-too" not in text
    assert "do-not-show" not in text
    assert "nor-that-one" not in text
    assert "neither-this" not in text


async def test_a_bus_that_is_not_there_is_named_without_its_password() -> None:
    url = f"nats://user:password-too@127.0.0.1:{free_port()}"
    with pytest.raises(UnavailableError) as caught:
        async with connect_bus(Settings(nats_url=url, startup_timeout_seconds=0.3)):
            pass
    assert "127.0.0.1" in str(caught.value)
    assert "password-too" not in str(caught.value)


def test_what_the_operator_sets_holds_with_the_development_key_too() -> None:
    assert Settings(dev_key=True, cors_origins="*").browser_origins == "*"
    assert Settings(dev_key=True, cors_origins="https://a.example").browser_origins == (
        "https://a.example"
    )
    assert Settings(dev_key=True).browser_origins == "loopback"
    assert Settings(dev_key=True, api_keys_file="keys.toml").browser_origins == "*"
    assert Settings().browser_origins == "*"
