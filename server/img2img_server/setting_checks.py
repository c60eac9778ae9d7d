"""Checks the settings of a role before anything slow starts, and reports all mistakes at once.

Here is what `Settings` cannot tell from the text: files, folders, keys and ports. A role is only
checked for what it uses. Nothing here opens a connection to another machine.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

from img2img_server.domain.params import Limits
from img2img_server.ports import listeners, reserve
from img2img_server.setting_files import read_bytes
from img2img_server.settings import Settings, SettingsError, variable


def checked_settings(role: str, **overrides: object) -> Settings:
    """Reads the settings from the environment and checks them for a role.

    Args:
        role: api, gateway, worker, local; any other name has no files or ports to check.

    Raises:
        SettingsError: lists every mistake.
    """
    settings, mistakes, wrong = Settings.load_with_mistakes(**overrides)
    mistakes += mistakes_of(role, settings, skip=wrong)
    if mistakes:
        raise SettingsError(*mistakes)
    return settings


def mistakes_of(role: str, settings: Settings, skip: frozenset[str] = frozenset()) -> list[str]:
    """Checks the settings that a role uses; returns one sentence for each mistake.

    Args:
        skip: settings that are known to be wrong.
    """
    checks = _Checks(settings, skip)
    for check in _OF_ROLE.get(role, ()):
        check(checks)
    return list(dict.fromkeys(checks.mistakes))


@dataclass
class _Checks:
    settings: Settings
    skip: frozenset[str]
    mistakes: list[str] = field(default_factory=list)

    def add(self, name: str, fault: str) -> None:
        self.mistakes.append(f"{variable(name)}: {fault}")

    @contextmanager
    def raised(self) -> Iterator[None]:
        """Takes the mistakes of a SettingsError that the body raises."""
        try:
            yield
        except SettingsError as error:
            self.mistakes += error.mistakes

    def read(self, name: str) -> bytes | None:
        """The content of the file that a setting names; None where there is none to look at."""
        path: Path | None = getattr(self.settings, name)
        if path is None or name in self.skip:
            return None
        try:
            return read_bytes(path)
        except OSError as error:
            self.add(name, f"{path} cannot be read: {error.strerror or error}")
            return None

    def folder(self, name: str) -> None:
        """A folder that must be there."""
        path: Path | None = getattr(self.settings, name)
        if path is None or name in self.skip:
            return
        try:
            os.scandir(path).close()
        except OSError as error:
            self.add(name, f"folder {path} cannot be read: {error.strerror or error}")

    def writable_folder(self, name: str) -> None:
        """A folder that is there or can be made, and takes files. Makes nothing."""
        path: Path | None = getattr(self.settings, name)
        if path is None or name in self.skip:
            return
        there = path.absolute()
        while not os.path.lexists(there) and there != there.parent:
            there = there.parent
        try:
            with tempfile.TemporaryFile(dir=there):
                pass
        except OSError as error:
            made = "" if there == path.absolute() else f", so {path} cannot be made"
            self.add(name, f"folder {there} is not writable: {error.strerror or error}{made}")


def _ports(role: str, checks: _Checks) -> None:
    wanted = [
        listener
        for listener in listeners(role, checks.settings)
        if not {listener.host_setting, listener.port_setting} & checks.skip
    ]
    with checks.raised():
        reserve(wanted)


def _pair(checks: _Checks, cert_name: str, key_name: str) -> None:
    """A certificate and its key."""
    found = checks.read(cert_name), checks.read(key_name)
    if None in found:
        return
    from img2img_server.certificates import pair_faults

    names = cert_name, key_name
    paths = [getattr(checks.settings, name) for name in names]
    for name, path, fault in zip(names, paths, pair_faults(*paths), strict=True):
        if fault:
            checks.add(name, f"{path} {fault}")


def _trusted(checks: _Checks, name: str) -> None:
    """Certificates to trust."""
    content = checks.read(name)
    if content is None:
        return
    from img2img_server.certificates import trusted_fault

    if fault := trusted_fault(content):
        checks.add(name, f"{getattr(checks.settings, name)} {fault}")


def _trust_bundle(checks: _Checks) -> None:
    """The authorities that OpenSSL trusts: it ignores a file that it cannot read."""
    if not (named := os.environ.get("SSL_CERT_FILE")):
        return
    from img2img_server.certificates import trusted_fault

    try:
        fault = trusted_fault(read_bytes(Path(named)))
    except OSError as error:
        fault = f"cannot be read: {error.strerror or error}"
    if fault:
        checks.mistakes.append(f"SSL_CERT_FILE: {named} {fault}")


def _tls(checks: _Checks) -> None:
    _pair(checks, "tls_cert_file", "tls_key_file")


def _api_ca(checks: _Checks) -> None:
    _trusted(checks, "api_ca_file")


def _local_tls(checks: _Checks) -> None:
    settings = checks.settings
    if settings.tls_cert_file and not settings.api_ca_file and "api_ca_file" not in checks.skip:
        checks.add(
            "api_ca_file",
            "is not set; the gateway of `local` needs it where IMG2IMG_TLS_CERT_FILE is set",
        )


def _s3(checks: _Checks) -> None:
    if not checks.settings.s3_endpoint_url:
        checks.add("s3_endpoint_url", "must name an S3 server, such as http://127.0.0.1:8333")
    elif not checks.skip & {"s3_endpoint_url", "s3_region", "s3_bucket"}:
        from img2img_server.storage.s3_access import S3Access

        with checks.raised():
            S3Access.from_settings(checks.settings)


def _api_s3(checks: _Checks) -> None:
    if checks.settings.base64_inline:
        _s3(checks)


def _nats(checks: _Checks) -> None:
    before = len(checks.mistakes)
    _pair(checks, "nats_cert_file", "nats_key_file")
    _trusted(checks, "nats_ca_file")
    content = checks.read("nats_creds_file")
    parts = (b"BEGIN NATS USER JWT", b"BEGIN USER NKEY SEED")
    if content is not None and (missing := [part for part in parts if part not in content]):
        named = " and no ".join(part.decode() for part in missing)
        path = checks.settings.nats_creds_file
        checks.add("nats_creds_file", f"{path} is no NATS credentials file: it has no {named}")
    if checks.skip & {"nats_url", "nats_user", "nats_password", "nats_token"}:
        return
    from img2img_server.nats.access import NatsAccess

    with checks.raised():
        access = NatsAccess.from_settings(checks.settings)
        if len(checks.mistakes) == before:
            access.tls  # noqa: B018 - reads the files as a connection does


def _storage_keys(checks: _Checks) -> None:
    if checks.settings.storage_keys.get_secret_value():
        from img2img_server.storage.vault import Vault

        with checks.raised():
            Vault(checks.settings.storage_keys.get_secret_value())


def _webhook_secret(checks: _Checks) -> None:
    if checks.settings.webhook_secret.get_secret_value():
        from img2img_server.webhooks.signature import Signer

        with checks.raised():
            Signer(checks.settings.webhook_secret.get_secret_value())


def _outbound_allow(checks: _Checks) -> None:
    if checks.settings.outbound_allow:
        from img2img_server.outbound.policy import OutboundPolicy

        with checks.raised():
            OutboundPolicy.parse(checks.settings.outbound_allow)


def _api_keys(checks: _Checks) -> None:
    """The keys file, and that nothing listens beyond loopback without one."""
    from img2img_server.api.keys import load_keys

    if not {"api_keys_file", "dev_key", "grpc_host"} & checks.skip:
        with checks.raised():
            load_keys(checks.settings)


def _http_dev_key(checks: _Checks) -> None:
    if not {"api_keys_file", "dev_key", "http_host"} & checks.skip:
        with checks.raised():
            checks.settings.refuse_open_dev_key(checks.settings.http_host)


def _local_keys(checks: _Checks) -> None:
    """Checks the API keys of `local`, which has the development key if no file is configured."""
    if "api_keys_file" in checks.skip:
        return
    ours = checks.settings.model_copy(update={"dev_key": checks.settings.api_keys_file is None})
    others = _Checks(ours, checks.skip)
    _api_keys(others)
    _http_dev_key(others)
    checks.mistakes += others.mistakes


def _model(checks: _Checks) -> None:
    settings = checks.settings
    if "model" in checks.skip:
        return
    from img2img_server.engine.model_spec import ModelError, read_model_spec
    from img2img_server.engine.options import sizes

    try:
        spec = read_model_spec(settings.model)
    except (ModelError, ValueError) as error:
        checks.add("model", str(error))
        return
    except OSError as error:
        checks.add("model", f"{error.filename} cannot be read: {error.strerror}")
        return
    for height, width in sizes(settings.warm_up_sizes):
        if height % spec.multiple or width % spec.multiple:
            fault = f"{width}x{height}: {spec.name} needs sides divisible by {spec.multiple}"
            checks.add("warm_up_sizes", fault)
        if max(height, width) > (most := Limits().max_side_pixels):
            checks.add("warm_up_sizes", f"{width}x{height}: requests have sides of at most {most}")
    folder = Path(spec.source)
    if (
        settings.safety_checker == "model"
        and folder.is_dir()
        and not (folder / "safety_checker" / "config.json").is_file()
    ):
        checks.add("safety_checker", f"is model, but {folder} has no folder safety_checker")


def _model_folders(checks: _Checks) -> None:
    settings = checks.settings
    checks.folder("lora_dir")
    checks.writable_folder("compile_cache_dir")
    source = settings.tiny_vae
    if "tiny_vae" in checks.skip or not source or not _looks_like_a_path(source):
        return  # a hub id is left to the libraries
    if not (Path(source) / "config.json").is_file():
        checks.add("tiny_vae", f"{source} has no config.json, so it is no autoencoder")


def _device_too(checks: _Checks) -> None:
    """Says with a wrong dtype that the device is not there, and the other way round. Only then is
    torch imported here; the worker looks at the device before it loads anything else."""
    settings = checks.settings
    if "dtype" not in checks.skip or not settings.device.startswith("cuda"):
        return
    from img2img_server.engine.device import choose_device

    with checks.raised():
        choose_device(settings.device)


def _looks_like_a_path(source: str) -> bool:
    """Whether a model is a folder rather than a hub id, owner/name."""
    return Path(source).is_dir() or source.startswith((".", "/", "~")) or source.count("/") > 1


def _state(checks: _Checks) -> None:
    checks.writable_folder("state_dir")


_Check = Callable[[_Checks], None]
_BUS: Final[tuple[_Check, ...]] = (_nats, _trust_bundle, _storage_keys)
_API: Final[tuple[_Check, ...]] = (_tls, _api_keys, _webhook_secret, _outbound_allow, _api_s3)
_GATEWAY: Final[tuple[_Check, ...]] = (_http_dev_key, _api_ca, _trust_bundle, _s3)
_WORKER: Final[tuple[_Check, ...]] = (_s3, _outbound_allow, _model, _model_folders, _device_too)
_OF_ROLE: Final[dict[str, Iterable[_Check]]] = {
    "api": (partial(_ports, "api"), *_BUS, *_API),
    "gateway": (partial(_ports, "gateway"), *_GATEWAY),
    "worker": (partial(_ports, "worker"), *_BUS, *_WORKER),
    "local": (
        _state,
        partial(_ports, "local"),
        _storage_keys,
        _tls,
        _local_keys,
        _webhook_secret,
        _outbound_allow,
        _api_ca,
        _model,
        _model_folders,
        _local_tls,
        _device_too,
    ),
}
