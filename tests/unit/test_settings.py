"""Settings report every mistake at once and hide secrets."""

import pytest

from img2img_server.settings import Settings, SettingsError


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


def test_one_half_of_a_tls_pair_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMG2IMG_TLS_CERT_FILE", "/tmp/cert.pem")
    with pytest.raises(SettingsError, match="must be given together"):
        Settings.load()


def test_secrets_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMG2IMG_S3_SECRET_KEY", "do-not-show")
    monkeypatch.setenv("IMG2IMG_WEBHOOK_SECRET", "neither-this")
    text = repr(Settings.load())
    assert "do-not-show" not in text
    assert "neither-this" not in text
