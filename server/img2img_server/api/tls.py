"""The certificates of the gRPC server, which are read again when they are replaced."""

from __future__ import annotations

import grpc
import structlog

from img2img_server.certificates import read_pair, read_trusted, validity_fault
from img2img_server.reloaded_files import ReloadedFiles
from img2img_server.settings import Settings

_CLIENTS = "tls_client_ca_file"

log = structlog.get_logger()


def server_credentials(settings: Settings) -> grpc.ServerCredentials:
    """Returns credentials with the newest content of the files at each new connection.

    With `tls_client_ca_file`, clients without a certificate of these authorities are refused.

    Raises:
        SettingsError: the files cannot be used.
    """
    names = ["tls_cert_file", "tls_key_file"]
    if settings.tls_client_ca_file:
        names.append(_CLIENTS)
    files = ReloadedFiles(
        "tls_files", [getattr(settings, name) for name in names], lambda: _read(settings)
    )
    return grpc.dynamic_ssl_server_credentials(
        files.current(),
        files.current,
        require_client_authentication=settings.tls_client_ca_file is not None,
    )


def _read(settings: Settings) -> grpc.ServerCertificateConfiguration:
    pair = read_pair(settings, "tls_cert_file", "tls_key_file")
    authorities = read_trusted(settings, _CLIENTS) if settings.tls_client_ca_file else None
    if fault := validity_fault(pair[1]):
        log.warning(
            "tls_certificate_not_valid",
            reason=f"IMG2IMG_TLS_CERT_FILE: the certificate {fault}: clients will refuse it",
        )
    return grpc.ssl_server_certificate_configuration([pair], authorities)
