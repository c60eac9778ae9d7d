"""Checks the settings of a role before anything slow starts, and reports all mistakes at once.

`Settings` checks the syntax; this module checks files, folders, keys and ports. Only the settings
that a role uses are checked. No check opens a connection to another machine.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from img2img_server.api.keys import load_keys
from img2img_server.api.stream_tokens import parse_keys
from img2img_server.certificates import pair_faults, trusted_fault
from img2img_server.engine.catalogue import read_catalogue
from img2img_server.engine.family import ModelError, access_cure
from img2img_server.engine.model_spec import ModelDefaults, read_model_spec, size_faults
from img2img_server.nats.access import NatsAccess
from img2img_server.outbound.policy import OutboundPolicy
from img2img_server.ports import listeners, reserve
from img2img_server.setting_files import read_bytes
from img2img_server.setting_names import variable
from img2img_server.settings import Settings, SettingsError
from img2img_server.storage.s3_access import S3Access
from img2img_server.storage.vault import Vault
from img2img_server.webhooks.signature import Signer

_CREDS_PARTS: Final = (b"BEGIN NATS USER JWT", b"BEGIN USER NKEY SEED")


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
    checks = _Checks(role, settings, skip)
    for check in _CHECKS.get(role, ()):
        check(checks)
    return list(dict.fromkeys(checks.mistakes))


@dataclass
class _Checks:
    role: str
    settings: Settings
    skip: frozenset[str]
    mistakes: list[str] = field(default_factory=list)

    def add(self, name: str, fault: str) -> None:
        self.mistakes.append(f"{variable(name)}: {fault}")

    def run(self, check: Callable[[], object], *names: str) -> None:
        """Collects the mistakes of a SettingsError, unless one of the settings is wrong already."""
        if self.skip.isdisjoint(names):
            try:
                check()
            except SettingsError as error:
                self.mistakes += error.mistakes

    def path(self, name: str) -> Path | None:
        """Returns the path of a setting, None where it is not set or known to be wrong."""
        found: Path | None = getattr(self.settings, name)
        return None if name in self.skip else found

    def read(self, name: str) -> bytes | None:
        """Returns the content of a setting's file, None where there is none."""
        if path := self.path(name):
            try:
                return read_bytes(path)
            except OSError as error:
                self.add(name, f"{path} cannot be read: {error.strerror or error}")
        return None

    def writable_folder(self, name: str) -> None:
        """Checks a folder that exists or can be created. Creates nothing."""
        if (path := self.path(name)) and (fault := _write_fault(path)):
            self.add(name, fault)

    def pair(self, *names: str) -> None:
        """Checks a certificate and its key."""
        if None not in [self.read(name) for name in names]:
            certificate, key = paths = [getattr(self.settings, name) for name in names]
            faults = pair_faults(certificate, key)
            for name, path, fault in zip(names, paths, faults, strict=True):
                if fault:
                    self.add(name, f"{path} {fault}")

    def trusted(self, name: str) -> None:
        """Checks a file of trusted certificates."""
        content = self.read(name)
        if content is not None and (fault := trusted_fault(content)):
            self.add(name, f"{getattr(self.settings, name)} {fault}")


def _ports(checks: _Checks) -> None:
    found = listeners(checks.role, checks.settings)
    wanted = [each for each in found if not {each.host_setting, each.port_setting} & checks.skip]
    checks.run(lambda: reserve(wanted))


def _state(checks: _Checks) -> None:
    checks.writable_folder("state_dir")


def _trust_bundle(checks: _Checks) -> None:
    """Checks the file of authorities that OpenSSL reads: OpenSSL ignores a file that it cannot
    read.
    """
    if named := os.environ.get("SSL_CERT_FILE"):
        try:
            fault = trusted_fault(read_bytes(Path(named)))
        except OSError as error:
            fault = f"cannot be read: {error.strerror or error}"
        if fault:
            checks.mistakes.append(f"SSL_CERT_FILE: {named} {fault}")


def _tls(checks: _Checks) -> None:
    checks.pair("tls_cert_file", "tls_key_file")
    checks.trusted("tls_client_ca_file")


def _api_ca(checks: _Checks) -> None:
    checks.trusted("api_ca_file")
    checks.pair("api_cert_file", "api_key_file")
    if checks.role == "local":
        _needed_by_local(checks, "api_ca_file", "tls_cert_file")
        _needed_by_local(checks, "api_cert_file", "tls_client_ca_file")


def _needed_by_local(checks: _Checks, name: str, cause: str) -> None:
    settings = checks.settings
    if getattr(settings, cause) and not getattr(settings, name):
        fault = f"is not set; the gateway of `local` needs it where {variable(cause)} is set"
        checks.run(lambda: checks.add(name, fault), name)


def _s3(checks: _Checks) -> None:
    if not checks.settings.s3_endpoint_url:
        checks.add("s3_endpoint_url", "must name an S3 server, such as http://127.0.0.1:8333")
    else:
        names = "s3_endpoint_url", "s3_region", "s3_bucket"
        checks.run(lambda: S3Access.from_settings(checks.settings), *names)


def _api_s3(checks: _Checks) -> None:
    if checks.settings.base64_inline or checks.settings.upload_bytes:
        _s3(checks)


def _nats(checks: _Checks) -> None:
    before = len(checks.mistakes)
    checks.pair("nats_cert_file", "nats_key_file")
    checks.trusted("nats_ca_file")
    content = checks.read("nats_creds_file")
    if content is not None and (missing := [part for part in _CREDS_PARTS if part not in content]):
        named = " and no ".join(part.decode() for part in missing)
        path = checks.settings.nats_creds_file
        checks.add("nats_creds_file", f"{path} is no NATS credentials file: it has no {named}")

    def access() -> None:
        found = NatsAccess.from_settings(checks.settings)
        if len(checks.mistakes) == before:
            found.tls  # noqa: B018 - reads the files as a connection does

    checks.run(access, "nats_url", "nats_user", "nats_password", "nats_token")


def _storage_keys(checks: _Checks) -> None:
    checks.run(lambda: Vault(checks.settings.storage_keys.get_secret_value()))


def _stream_token_keys(checks: _Checks) -> None:
    checks.run(lambda: parse_keys(checks.settings.stream_token_keys.get_secret_value()))


def _webhook_secret(checks: _Checks) -> None:
    settings = checks.settings
    checks.run(lambda: Signer(settings.webhook_secret.get_secret_value()))
    checks.run(lambda: Signer(file=settings.webhook_secrets_file), "webhook_secrets_file")


def _outbound_allow(checks: _Checks) -> None:
    checks.run(lambda: OutboundPolicy.parse(checks.settings.outbound_allow))


def _api_keys(checks: _Checks) -> None:
    """Checks the keys file, and that the api does not listen beyond loopback without one."""
    checks.run(lambda: load_keys(checks.settings), "api_keys_file", "dev_key", "grpc_host")


def _http_dev_key(checks: _Checks) -> None:
    settings = checks.settings
    refuse = settings.refuse_open_dev_key
    checks.run(lambda: refuse(settings.http_host), "api_keys_file", "dev_key", "http_host")


def _local_keys(checks: _Checks) -> None:
    """Checks the API keys of `local`, which has the development key if no file is configured."""
    if "api_keys_file" not in checks.skip:
        dev_key = checks.settings.api_keys_file is None
        ours = checks.settings.model_copy(update={"dev_key": dev_key})
        others = _Checks(checks.role, ours, checks.skip, checks.mistakes)
        _api_keys(others)
        _http_dev_key(others)


_MODEL_FOLDERS: Final = ("lora_dir", "embeddings_dir", "vae_dir")


def _folder_fault(path: Path) -> str:
    try:
        os.scandir(path).close()
    except NotADirectoryError:
        return f"{path} is a file, but must be a folder: name the folder that has the file"
    except PermissionError as error:
        return f"folder {path} cannot be read: {error.strerror}: correct its permissions"
    except OSError as error:
        why = error.strerror or error
        return f"folder {path} cannot be read: {why}: create it, or correct the path"
    return ""


def _write_fault(path: Path) -> str:
    there = path.absolute()
    while not os.path.lexists(there) and there != there.parent:
        there = there.parent
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        made = "" if there == path.absolute() else f", so {path} cannot be made"
        return f"folder {there} is not writable: {error.strerror or error}{made}"
    return ""


def _catalogue(checks: _Checks) -> None:
    """Checks the file and its folders, no model: a worker serves those that can be loaded."""

    def check() -> None:
        for model in read_catalogue(checks.settings):
            own = model.settings
            for name in ("model_parts_dir", *_MODEL_FOLDERS):
                if (path := getattr(own, name)) == getattr(checks.settings, name):
                    continue
                is_copied = name == "lora_dir" and own.lora_s3_prefix
                if fault := _write_fault(path) if is_copied else _folder_fault(path):
                    checks.mistakes.append(own.origin.explain(f"{variable(name)}: {fault}"))

    checks.run(check, "models_file")


def _model(checks: _Checks) -> None:
    settings = checks.settings
    if settings.models_file is not None:
        _catalogue(checks)
        return
    if "model" in checks.skip:
        return
    try:
        spec = read_model_spec(settings.model, defaults=ModelDefaults.of(settings))
    except ModelError as error:
        checks.mistakes.append(error.mistake)
        return
    except ValueError as error:
        checks.add("model", str(error))
        return
    except OSError as error:
        checks.add(
            "model", f"{error.filename} cannot be read: {error.strerror}{access_cure(error)}"
        )
        return
    for fault in size_faults(settings.warm_up_sizes, spec, settings.max_side_pixels):
        checks.add("warm_up_sizes", fault)
    folder = Path(spec.source)
    lacking = folder.exists() and not (folder / "safety_checker" / "config.json").is_file()
    if settings.safety_checker == "model" and lacking:
        checks.add("safety_checker", f"is model, but {folder} has no folder safety_checker")


def _model_folders(checks: _Checks) -> None:
    for name in _MODEL_FOLDERS:
        is_copied = name == "lora_dir" and checks.settings.lora_s3_prefix
        if not is_copied and (path := checks.path(name)) and (fault := _folder_fault(path)):
            checks.add(name, fault)
    if checks.settings.lora_s3_prefix:
        checks.writable_folder("lora_dir")
    checks.writable_folder("compile_cache_dir")
    source = checks.settings.tiny_vae
    # A hub id, owner/name, is left to the libraries.
    is_path = Path(source).is_dir() or source.startswith((".", "/", "~")) or source.count("/") > 1
    if source and is_path and not (Path(source) / "config.json").is_file():
        fault = f"{source} has no config.json, so it is no autoencoder"
        checks.run(lambda: checks.add("tiny_vae", fault), "tiny_vae")


def _device_too(checks: _Checks) -> None:
    """Reports a missing device together with a wrong dtype. It imports torch only if the dtype is
    wrong. Otherwise the worker checks the device when it starts.
    """
    if "dtype" in checks.skip and checks.settings.device.startswith("cuda"):
        from img2img_server.engine.device import choose_device

        checks.run(lambda: choose_device(checks.settings.device))


_Check = Callable[[_Checks], None]
_NATS: Final = (_nats, _trust_bundle, _storage_keys)
_MODEL: Final = (_model, _model_folders, _device_too)
_CHECKS: Final[dict[str, tuple[_Check, ...]]] = {
    "api": (
        _ports,
        *_NATS,
        _tls,
        _api_keys,
        _webhook_secret,
        _outbound_allow,
        _api_s3,
        _stream_token_keys,
    ),
    "gateway": (_ports, _http_dev_key, _api_ca, _trust_bundle, _s3),
    "worker": (_ports, *_NATS, _s3, _outbound_allow, *_MODEL),
    "doctor": _MODEL,
    "local": (
        *(_state, _ports, _storage_keys, _tls, _local_keys, _webhook_secret, _outbound_allow),
        *(_api_ca, _stream_token_keys, *_MODEL),
    ),
}
