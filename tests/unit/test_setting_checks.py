"""Checks of a role's settings: each setting is wrong once, and the error names it. All mistakes are
reported together.
"""

from __future__ import annotations

import codecs
import errno
import json
import os
import socket
import ssl
import string
import subprocess
import sys
import tomllib
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from importlib.metadata import packages_distributions
from pathlib import Path

import grpc
import pytest
import trustme
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)
from hypothesis import given
from hypothesis import strategies as st
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from img2img_server import setting_syntax
from img2img_server.__main__ import EXTRAS
from img2img_server.certificates import pair_faults, trusted_fault, validity_fault
from img2img_server.errors import UnavailableError
from img2img_server.exit_reason import code_of, reasons_of
from img2img_server.last_line import exit_with_reasons
from img2img_server.ports import Listener, host_port, listeners, reachable, reserve
from img2img_server.setting_checks import checked_settings, mistakes_of
from img2img_server.setting_files import read_bytes
from img2img_server.setting_names import variable
from img2img_server.settings import Settings, SettingsError
from tests.readme import ROOT

ROLES = ("api", "gateway", "worker", "local")
# A value that no role accepts. A setting that accepts any text must be one line.
WRONG: dict[str, str] = {
    "grpc_host": "http://0.0.0.0",
    "http_host": "127.0.0.1:8080",
    "metrics_host": "not a host",
    "grpc_port": "eighty",
    "http_port": "70000",
    "metrics_port": "-1",
    "api_address": "http://api:50051",
    "public_base_url": "img.example.com",
    "playground": "perhaps",
    "nats_replicas": "9",
    "s3_endpoint_url": "127.0.0.1:8333",
    "s3_bucket": "a bucket",
    "dev_key": "dev-key",
    "device": "gpu",
    "dtype": "float8",
    "max_batch_size": "0",
    "torch_threads": "many",
    "channels_last": "2.5",
    "fuse_qkv": "",
    "compile": "all",
    "warm_up_sizes": "512",
    "vae_tile_pixels": "0",
    "tiny_vae_use": "nothing",
    "memory_limit_bytes": "4GB",
    "safety_checker": "off",
    "safety_threshold": "2",
    "prompt_rewriter": "gpt",
    "cors_origins": "https://shop.example.com/",
    "legacy": "older",
    "base64_inline": "x",
    "log_level": "loud",
    "log_format": "xml",
    "otlp_endpoint": "collector:4317",
    "use_proxy_environment": "http://proxy",
}


def wrong_value(name: str) -> str:
    if name in WRONG:
        return WRONG[name]
    kind = str(Settings.model_fields[name].annotation)
    return "two\nlines" if "str" in kind.lower() or "Path" in kind else "many"


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.upper().startswith("IMG2IMG_")]:
        monkeypatch.delenv(name)
    for port in ("GRPC", "HTTP", "METRICS"):
        monkeypatch.setenv(f"IMG2IMG_{port}_PORT", "0")
    monkeypatch.setenv("IMG2IMG_STATE_DIR", str(tmp_path / "state"))


@pytest.fixture
def give(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets settings in the environment."""

    def give(**values: object) -> None:
        for name, value in values.items():
            monkeypatch.setenv(variable(name), str(value))

    return give


def refused(role: str) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        checked_settings(role)
    return list(caught.value.mistakes)


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_with_a_wrong_value_is_named(give: Callable[..., None], name: str) -> None:
    give(**{name: wrong_value(name)})
    mistakes = refused("worker")
    assert any(mistake.startswith(f"{variable(name)}: ") for mistake in mistakes), mistakes


def test_all_settings_that_are_wrong_are_named_at_once(give: Callable[..., None]) -> None:
    give(**{name: wrong_value(name) for name in Settings.model_fields})
    named = {mistake.partition(":")[0] for mistake in refused("local")}
    assert named >= {variable(name) for name in Settings.model_fields}


@pytest.mark.parametrize("role", ROLES)
def test_what_is_wrong_in_files_and_ports_is_reported_with_what_is_wrong_in_the_text(
    give: Callable[..., None], role: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        give(
            metrics_port=port,
            log_level="loud",
            lora_dir="/no/such/folder",
            tls_cert_file="/no/such/cert.pem",
            tls_key_file="/no/such/key.pem",
            api_ca_file="/no/such/ca.pem",
            api_keys_file="/no/such/keys.toml",
            storage_keys="short",
            stream_token_keys="short",
            model="/no/such/model",
        )
        mistakes = refused(role)
    named = [mistake.partition(":")[0].removeprefix("IMG2IMG_") for mistake in mistakes]
    front = ["TLS_CERT_FILE", "TLS_KEY_FILE", "API_KEYS_FILE"]
    assert sorted(named) == sorted(
        {
            "api": ["METRICS_PORT", "LOG_LEVEL", "STORAGE_KEYS", "STREAM_TOKEN_KEYS", *front],
            "gateway": ["METRICS_PORT", "LOG_LEVEL", "API_CA_FILE"],
            "worker": ["METRICS_PORT", "LOG_LEVEL", "STORAGE_KEYS", "LORA_DIR", "MODEL"],
            "local": [
                *["METRICS_PORT", "LOG_LEVEL", "STORAGE_KEYS", "LORA_DIR", "MODEL"],
                *["API_CA_FILE", "STREAM_TOKEN_KEYS", *front],
            ],
        }[role]
    ), "a role is only checked for what it uses"
    assert f"IMG2IMG_METRICS_PORT: 127.0.0.1:{port} is in use" in "\n".join(mistakes)


@pytest.mark.parametrize("empty", ["", " "])
def test_an_empty_path_is_none_and_not_the_working_directory(
    give: Callable[..., None], empty: str
) -> None:
    paths = [name for name, field in Settings.model_fields.items() if "Path" in str(field)]
    assert {"lora_dir", "tls_cert_file", "api_keys_file", "nats_creds_file"} <= set(paths)
    give(**dict.fromkeys(paths, empty))
    settings, default = Settings.load(), Settings.model_fields
    assert {name: getattr(settings, name) for name in paths} == {
        name: default[name].default for name in paths
    }
    assert settings.lora_dir is None


NUMBERS = [
    name
    for name, field in Settings.model_fields.items()
    if field.annotation in (int, float) and name != "safety_threshold"
]


@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_has_a_most(give: Callable[..., None], name: str) -> None:
    for value in ("inf", "nan", "1e400", f"1{'0' * 30}"):
        give(**{name: value})
        assert refused("worker")[0].startswith(f"{variable(name)}: must be ")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("GRPC_PROT", "; is IMG2IMG_GRPC_PORT meant?"),
        ("S3ENDPOINT_URL", "; is IMG2IMG_S3_ENDPOINT_URL meant?"),
        ("ZZZ", ""),
    ],
)
def test_an_unknown_name_is_reported_with_the_nearest_one(
    monkeypatch: pytest.MonkeyPatch, name: str, near: str
) -> None:
    monkeypatch.setenv(f"IMG2IMG_{name}", "x")
    assert refused("worker") == [f"IMG2IMG_{name}: there is no such setting{near}"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("http_host", "127.0.0.1 "),
        ("s3_endpoint_url", " http://127.0.0.1:8333"),
        ("s3_bucket", "img2img "),
        ("api_address", "api:50051 "),
    ],
)
def test_a_space_at_the_end_is_reported_as_one(
    give: Callable[..., None], name: str, value: str
) -> None:
    give(**{name: value})
    assert refused("gateway") == [f"{variable(name)}: must not have spaces"]


@pytest.mark.parametrize("role", ROLES)
def test_the_defaults_have_no_mistake_but_the_missing_keys(role: str) -> None:
    missing = {"api": ["IMG2IMG_API_KEYS_FILE"]}.get(role, [])
    found = [mistake.partition(":")[0] for mistake in mistakes_of(role, Settings.load())]
    assert found == missing


def test_a_secret_is_never_shown(give: Callable[..., None]) -> None:
    secrets = [name for name, field in Settings.model_fields.items() if "Secret" in str(field)]
    give(**dict.fromkeys(secrets, "hunter2\nhunter2"))
    give(nats_url="nats://u:hunter2#/x@h:p")
    for role in ROLES:
        assert "hunter2" not in "\n".join(refused(role))


# TLS files.


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def encrypted(pem: bytes) -> bytes:
    key = load_pem_private_key(pem, None)
    return key.private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"passphrase")
    )


@pytest.mark.parametrize(
    ("cert", "key", "mistakes"),
    [
        ("cert", "key", []),
        ("none", "key", ["TLS_CERT_FILE: {}/none cannot be read: No such file or directory"]),
        ("folder", "key", ["TLS_CERT_FILE: {}/folder cannot be read: Is a directory"]),
        ("junk", "key", ["TLS_CERT_FILE: {}/junk has no certificate in PEM format"]),
        ("key", "key", ["TLS_CERT_FILE: {}/key has no certificate in PEM format"]),
        ("cert", "cert", ["TLS_KEY_FILE: {}/cert has no private key in PEM format"]),
        ("cert", "other", ["TLS_KEY_FILE: {}/other is not the key of {}/cert"]),
        ("cert", "secret", ["TLS_KEY_FILE: {}/secret is encrypted"]),
        ("junk", "junk", ["TLS_CERT_FILE: {}/junk has no", "TLS_KEY_FILE: {}/junk has no"]),
        ("none", "none", ["TLS_CERT_FILE: {}/none cannot", "TLS_KEY_FILE: {}/none cannot"]),
    ],
)
def test_a_wrong_tls_file_is_named_and_not_the_port(
    authority: trustme.CA, tmp_path: Path, cert: str, key: str, mistakes: list[str]
) -> None:
    issued, other = authority.issue_cert("localhost"), authority.issue_cert("localhost")
    (tmp_path / "folder").mkdir()
    for name, content in {
        "cert": issued.cert_chain_pems[0].bytes(),
        "key": issued.private_key_pem.bytes(),
        "other": other.private_key_pem.bytes(),
        "secret": encrypted(issued.private_key_pem.bytes()),
        "junk": b"-----BEGIN CERTIFICATE-----\nbm90IG9uZQ==\n-----END CERTIFICATE-----\n",
    }.items():
        (tmp_path / name).write_bytes(content)
    settings = Settings(
        tls_cert_file=tmp_path / cert, tls_key_file=tmp_path / key, dev_key=True, grpc_port=0
    )
    found = mistakes_of("api", settings, skip=frozenset({"metrics_port"}))
    expected = [f"IMG2IMG_{mistake.replace('{}', str(tmp_path))}" for mistake in mistakes]
    assert len(found) == len(expected)
    for mistake, start in zip(sorted(found), sorted(expected), strict=True):
        assert mistake.startswith(start)


async def test_grpc_takes_a_certificate_and_a_key_with_a_byte_order_mark(
    tmp_path: Path, authority: trustme.CA
) -> None:
    issued = authority.issue_cert("localhost")
    cert, key = tmp_path / "cert", tmp_path / "key"
    cert.write_bytes(codecs.BOM_UTF8 + issued.cert_chain_pems[0].bytes())
    key.write_bytes(codecs.BOM_UTF8 + issued.private_key_pem.bytes())
    assert pair_faults(cert, key) == ("", "")
    pair = (read_bytes(key), read_bytes(cert))
    credentials = grpc.ssl_server_credentials([pair])
    assert grpc.aio.server().add_secure_port("127.0.0.1:0", credentials)


FILES = {
    "api": [
        *("tls_cert_file", "tls_key_file", "api_keys_file"),
        *("nats_creds_file", "nats_ca_file", "nats_cert_file", "nats_key_file"),
    ],
    "gateway": ["api_ca_file"],
}


@pytest.mark.parametrize("kind", ["pipe", "device", "huge"])
def test_what_never_ends_or_does_not_fit_is_not_read(
    give: Callable[..., None], tmp_path: Path, kind: str
) -> None:
    path, why = {
        "pipe": (tmp_path / "pipe", "it is a pipe, a socket or a device, not a file"),
        "device": (Path("/dev/zero"), "it is a pipe, a socket or a device, not a file"),
        "huge": (tmp_path / "huge", "it has more than 16 MiB"),
    }[kind]
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(2**40)
    for role, names in FILES.items():
        give(**dict.fromkeys(names, path))
        said = refused(role)
        assert {each.partition(":")[0] for each in said} == {variable(name) for name in names}
        assert all(each.endswith(f" cannot be read: {why}") for each in said)


def test_a_chain_in_the_wrong_order_and_a_certificate_out_of_its_time_are_reported(
    tmp_path: Path, authority: trustme.CA
) -> None:
    between = authority.create_child_ca().issue_cert("localhost")
    own, issuer = (pem.bytes() for pem in between.cert_chain_pems)
    cert, key = tmp_path / "cert", tmp_path / "key"
    key.write_bytes(between.private_key_pem.bytes())
    cert.write_bytes(own + issuer)
    assert pair_faults(cert, key) == ("", "")
    cert.write_bytes(issuer + own)
    assert pair_faults(cert, key) == (
        f"has the certificate of {key}, but not first: those of its issuers follow it",
        "",
    )
    now = datetime.now(UTC)
    for after, before, said in (
        (-2, -1, f"expired at {now - timedelta(days=1):%Y-%m-%d}"),
        (1, 2, f"is valid from {now + timedelta(days=1):%Y-%m-%d}"),
        (-1, 1, ""),
    ):
        issued = authority.issue_cert(
            "localhost",
            not_before=now + timedelta(days=after),
            not_after=now + timedelta(days=before),
        )
        fault = validity_fault(issued.cert_chain_pems[0].bytes())
        assert fault.startswith(said)
        assert bool(fault) == bool(said)


@given(st.data())
def test_the_check_of_a_pair_agrees_with_openssl(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    cert = data.draw(st.sampled_from([pair[0] for pair in PAIRS]))
    key = data.draw(st.sampled_from([pair[1] for pair in PAIRS]))
    if data.draw(st.booleans()):
        at = data.draw(st.integers(0, len(cert) - 1))
        cert = cert[:at] + data.draw(st.sampled_from([b"", b"A", b"\n"])) + cert[at + 1 :]
    folder = tmp_path_factory.mktemp("pair")
    (folder / "cert").write_bytes(cert)
    (folder / "key").write_bytes(key)
    found = mistakes_of(
        "api",
        Settings(tls_cert_file=folder / "cert", tls_key_file=folder / "key", dev_key=True),
        skip=frozenset({"grpc_port", "metrics_port", "nats_url"}),
    )
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(folder / "cert", folder / "key")
    except ssl.SSLError:
        theirs = False
    else:
        theirs = True
    assert (found == []) == theirs


MADE = trustme.CA()
PAIRS = [
    (issued.cert_chain_pems[0].bytes(), issued.private_key_pem.bytes())
    for issued in (MADE.issue_cert("a.example"), MADE.issue_cert("b.example"))
]


def test_a_bundle_with_comments_and_any_line_ends_is_trusted(authority: trustme.CA) -> None:
    pem = authority.cert_pem.bytes()
    for content in (pem, "# Türktrust\n".encode() + pem + pem, pem.replace(b"\n", b"\r\n")):
        assert trusted_fault(content) == ""
    for content in (b"", b"README", authority.private_key_pem.bytes(), pem[:200]):
        assert trusted_fault(content) == "has no certificate in PEM format"


@pytest.mark.parametrize("role", ["api", "gateway", "worker"])
def test_a_trust_bundle_that_openssl_would_ignore_is_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, role: str
) -> None:
    bundle = tmp_path / "bundle.pem"
    monkeypatch.setenv("SSL_CERT_FILE", str(bundle))
    assert f"SSL_CERT_FILE: {bundle} cannot be read: No such file or directory" in refused(role)
    bundle.write_bytes(b"README")
    assert f"SSL_CERT_FILE: {bundle} has no certificate in PEM format" in refused(role)


# Ports and addresses.


def test_every_port_of_local_is_reported_at_once() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as grpc,
        socket.create_server(("127.0.0.1", 0)) as http,
        socket.create_server(("127.0.0.1", 0)) as metrics,
    ):
        ports = [each.getsockname()[1] for each in (grpc, http, metrics)]
        settings = Settings(grpc_port=ports[0], http_port=ports[1], metrics_port=ports[2] - 1)
        with pytest.raises(SettingsError) as caught:
            reserve(listeners("local", settings))
    text = "\n".join(caught.value.mistakes)
    for name, port in zip(("GRPC", "HTTP", "METRICS"), ports, strict=True):
        assert f"IMG2IMG_{name}_PORT: 127.0.0.1:{port} is in use" in text
    assert f"`local` needs 3 ports in a row from {ports[2] - 1} on" in text


def test_ports_are_reported_once_with_what_is_wrong_with_them() -> None:
    said = {
        code: Listener("http_host", "http_port", "127.0.0.1", 80).mistake(OSError(code, "x"))
        for code in (errno.EADDRINUSE, errno.EACCES, errno.EADDRNOTAVAIL, errno.ENOBUFS)
    }
    assert [str(mistake) for mistake in said.values()] == [
        "IMG2IMG_HTTP_PORT: 127.0.0.1:80 is in use",
        "IMG2IMG_HTTP_PORT: this user may not listen on 127.0.0.1:80",
        "IMG2IMG_HTTP_HOST: 127.0.0.1 is no address of this machine",
        f"IMG2IMG_HTTP_PORT: cannot listen on 127.0.0.1:80: {os.strerror(errno.ENOBUFS)}",
    ]


@pytest.mark.parametrize(
    ("host", "said"),
    [
        ("192.0.2.1", "IMG2IMG_GRPC_HOST: 192.0.2.1 is no address of this machine"),
        ("no-such-host.invalid", "IMG2IMG_GRPC_HOST: the name no-such-host.invalid has no address"),
    ],
)
def test_a_host_that_is_not_ours_is_named(host: str, said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        reserve(listeners("api", Settings(grpc_host=host, grpc_port=0, metrics_port=0)))


def test_two_settings_with_the_same_port_are_reported() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(SettingsError, match=f"IMG2IMG_METRICS_PORT: 127.0.0.1:{port} is in use"):
        reserve(listeners("api", Settings(grpc_port=port, metrics_port=port)))


def test_addresses_are_written_as_urls_and_grpc_want_them() -> None:
    assert host_port("::1", 1) == host_port("[::1]", 1) == "[::1]:1"
    assert host_port("api", 1) == "api:1"
    assert [reachable(host) for host in ("0.0.0.0", "::", "[::]", "10.0.0.1")] == [
        "127.0.0.1",
        "::1",
        "::1",
        "10.0.0.1",
    ]


@pytest.mark.parametrize(
    "address",
    [
        *["api:50051", "127.0.0.1:50051", "[::1]:50051", "::1", "api.internal", "api_1:50051"],
        *["dns:///api:50051", "dns:api:50051", "dns://10.0.0.2/api:50051", "dns:///[::1]:50051"],
        *["ipv4:10.0.0.1:50051,10.0.0.2:50051", "ipv6:[::1]:50051", "ipv4:///10.0.0.1:50051"],
        *["unix:/run/api.sock", "unix:///run/api.sock", "unix:api.sock", "xds:///api"],
    ],
)
def test_every_form_of_a_grpc_address_is_taken(address: str) -> None:
    assert setting_syntax.api_address(address) == address


@pytest.mark.parametrize(
    "address",
    [
        *["", "http://api:50051", "https://api", "api:", "api:0", "api:70000", "api:grpc"],
        *["a b:1", "api/x:50051", "ipv4:api:50051", "ipv6:10.0.0.1:50051", "unix:", ":50051"],
        *["256.0.0.1:50051", "1.2.3:50051"],
    ],
)
def test_what_is_no_grpc_address_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match=r"must|has"):
        setting_syntax.api_address(address)


@pytest.mark.parametrize(
    ("url", "good"),
    [
        ("", True),
        ("https://img.example.com", True),
        ("https://img.example.com/", True),
        ("http://[::1]:8080/base", True),
        ("http://127.0.0.1:8080", True),
        ("HTTPS://IMG.example.com", True),
        ("img.example.com", False),
        ("ftp://img.example.com", False),
        ("https://", False),
        ("https://img.example.com:99999", False),
        ("https://img.example.com/?a=1", False),
        ("https://user:password@img.example.com", False),
        ("https://img example.com", False),
    ],
)
def test_a_public_base_url_is_a_url_that_paths_can_be_appended_to(url: str, good: bool) -> None:
    assert accepts(setting_syntax.base_url, url) is good


@pytest.mark.parametrize(
    ("origins", "good"),
    [
        ("*", True),
        ("", True),
        ("loopback, https://shop.example.com", True),
        ("http://localhost:3000,null,capacitor://localhost", True),
        ("https://shop.example.com/", False),
        ("shop.example.com", False),
        ("https://*.example.com", False),
    ],
)
def test_origins_are_those_that_browsers_send(origins: str, good: bool) -> None:
    assert accepts(setting_syntax.origins, origins) is good


@given(st.text(alphabet=string.printable, max_size=30))
def test_no_text_breaks_a_rule(text: str) -> None:
    rules = (
        *(setting_syntax.listen_host, setting_syntax.base_url, setting_syntax.s3_endpoint),
        *(setting_syntax.bucket_name, setting_syntax.otlp_endpoint, setting_syntax.api_address),
        *(setting_syntax.origins, setting_syntax.sizes, setting_syntax.device),
    )
    for rule in rules:
        accepts(rule, text)


def accepts(rule: Callable[[str], str], text: str) -> bool:
    try:
        return rule(text) == text
    except ValueError:
        return False


def test_addresses_by_number_are_refused_with_tls() -> None:
    """A certificate is compared with one name, so gRPC connects to no address of a list."""
    both = "ipv4:10.0.0.1:50051,10.0.0.2:50051"
    assert Settings(api_address=both).api_address == both
    with pytest.raises(ValueError, match="IMG2IMG_API_ADDRESS: with TLS"):
        Settings(api_address=both, api_ca_file="ca.pem")
    assert Settings(api_address="dns:///api:50051", api_ca_file="ca.pem").api_ca_file


# Reasons in the error messages.


def test_reasons_are_single_lines_and_those_of_groups_are_all_reported() -> None:
    group = ExceptionGroup(
        "tasks", [SettingsError("IMG2IMG_A: is\n  wrong"), UnavailableError("NATS is away")]
    )
    assert reasons_of(group) == ["IMG2IMG_A: is wrong", "NATS is away"]
    assert reasons_of(ZeroDivisionError()) == ["unexpected ZeroDivisionError: without a message"]
    assert [code_of(SettingsError("x")), code_of(group), code_of(KeyboardInterrupt())] == [
        2,
        1,
        130,
    ]


def test_the_last_line_is_a_record_where_the_log_is_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setenv("IMG2IMG_LOG_FORMAT", "console")
    exit_with_reasons("img2img-server api", ["x"], 2)
    assert capsys.readouterr().err == "img2img-server api: x\n"
    monkeypatch.setenv("IMG2IMG_LOG_FORMAT", "json")
    exit_with_reasons("img2img-server api", ["x"], 2)
    record = json.loads(capsys.readouterr().err)
    assert record.pop("timestamp").endswith("Z")
    assert record == {
        "event": "img2img-server api: x",
        "exit_code": 2,
        "role": "api",
        "level": "error",
    }
    assert codes == [2, 2]


def test_the_packages_that_a_role_asks_for_are_those_of_its_extra() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    brought = packages_distributions()
    for extra, modules in EXTRAS.items():
        listed = {
            canonicalize_name(Requirement(line).name)
            for line in project["optional-dependencies"][extra]
        }
        wanted = {
            canonicalize_name(name) for module in modules.split(", ") for name in brought[module]
        }
        if extra == "server":  # The worker role can run without some of these settings.
            assert listed == wanted & listed
        assert all(
            listed & {canonicalize_name(name) for name in brought[module]}
            for module in modules.split(", ")
        ), extra


@pytest.mark.parametrize("source", ["./none", "~/none", "/none", "none", "a/b/c", "../none"])
def test_a_model_that_looks_like_a_path_is_not_taken_for_a_hub_id(
    give: Callable[..., None], source: str
) -> None:
    give(model=source)
    (mistake,) = refused("worker")
    assert mistake.startswith(f"IMG2IMG_MODEL: there is no model at {source}: ")


def test_a_wrong_dtype_does_not_hide_a_device_that_is_not_there(give: Callable[..., None]) -> None:
    give(dtype="float8", device="cuda:99")
    assert [mistake.partition(":")[0] for mistake in refused("worker")] == [
        "IMG2IMG_DTYPE",
        "IMG2IMG_DEVICE",
    ]


@pytest.mark.parametrize("size", ["1032x512", "512x9992", "513x512"])
def test_a_size_that_no_request_may_have_is_not_run_first(
    give: Callable[..., None], size: str
) -> None:
    give(warm_up_sizes=f"512x512, {size}")
    (mistake,) = refused("worker")
    assert mistake.startswith(f"IMG2IMG_WARM_UP_SIZES: {size}: ")


def test_a_scheduler_that_the_model_does_not_have_is_named_by_its_setting(
    give: Callable[..., None],
) -> None:
    give(default_scheduler="fastest")
    (mistake,) = refused("worker")
    assert mistake.startswith("IMG2IMG_DEFAULT_SCHEDULER: scheduler 'fastest' of ")


def test_a_link_that_leads_nowhere_is_reported(give: Callable[..., None], tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "none")
    give(model=link, compile_cache_dir=link, lora_dir=link)
    assert refused("worker") == [
        f"IMG2IMG_MODEL: {link} is a link to {tmp_path}/none, which does not exist: "
        "correct the link",
        f"IMG2IMG_LORA_DIR: folder {link} cannot be read: No such file or directory: create it, or "
        "correct the path",
        f"IMG2IMG_COMPILE_CACHE_DIR: folder {link} is not writable: No such file or directory",
    ]


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("dreamy.safetensors", "is empty: fetch the file again"),
        ("dreamy.ckpt", "is a pickle, which can run code"),
        ("photo.png", "is empty: fetch the file again"),
        ("notes.txt", "is no model: a model is a directory"),
    ],
    ids=["empty", "pickle", "image", "text"],
)
def test_a_file_that_is_no_checkpoint_is_reported(
    name: str, fault: str, give: Callable[..., None], tmp_path: Path
) -> None:
    (tmp_path / name).write_text("notes" if name == "notes.txt" else "")
    give(model=tmp_path / name)
    assert fault in "".join(refused("worker"))


def test_the_command_of_a_plain_install_says_what_to_install(tmp_path: Path) -> None:
    """An import hook that hides the packages of the extras simulates an install without them."""
    program = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HIDDEN:
            raise ModuleNotFoundError(name, name=name)
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name in HIDDEN else real(name)
sys.meta_path.insert(0, Hidden())
from img2img_server.__main__ import main
main()
"""
    server = {"structlog", "pydantic", "pydantic_settings", "aiohttp", "fastapi", "nats", "torch"}
    for hidden, role, extra in (
        (server, "api", "server"),
        (server, "keys", "server"),
        (server, "local", "local"),
        ({"torch", "diffusers"}, "worker", "worker"),
    ):
        words = [role, "--tenant", "shop"] if role == "keys" else [role]
        ended = subprocess.run(
            [sys.executable, "-c", f"HIDDEN = {hidden!r}\n{program}", *words],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "IMG2IMG_LOG_FORMAT": "console"},
        )
        (line,) = ended.stderr.splitlines()
        assert ended.returncode == 1
        assert line.startswith(f"img2img-server {role}: needs the extra {extra}, ")
        assert line.endswith(
            f"in a clone of the repository, run: pip install ./client '.[{extra}]'"
        )
