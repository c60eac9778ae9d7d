"""Every setting of the service: nothing else reads IMG2IMG_ variables.

Other variables are read where their libraries are used: AWS_* by storage/s3_credentials.py and
storage/s3_access.py, SSL_CERT_FILE by OpenSSL, HF_* by the hub's library, OTEL_* by OpenTelemetry,
GOMP_SPINCOUNT and OMP_* by OpenMP.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self, get_args

from pydantic import (
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, SettingsConfigDict

from img2img_server import setting_syntax
from img2img_server.errors import OperatorError

PREFIX = "IMG2IMG_"
DEV_KEY = "dev-key"  # the well-known development key, see Settings.dev_key
# Of the command `img2img`: somebody may have both in one shell.
CLIENT_NAMES = frozenset({"IMG2IMG_SERVER", "IMG2IMG_API_KEY"})


_TOGETHER = (
    ("tls_cert_file", "tls_key_file"),
    ("nats_cert_file", "nats_key_file"),
    ("nats_user", "nats_password"),
    ("s3_access_key", "s3_secret_key"),
)


class SettingsError(OperatorError):
    """Settings are wrong. `mistakes`: a sentence for each, which begins with the setting's name."""

    def __init__(self, *mistakes: str) -> None:
        head = "wrong settings:\n  " if len(mistakes) > 1 else ""
        super().__init__(head + "\n  ".join(mistakes))
        self.mistakes = mistakes


class Settings(BaseSettings):
    """Settings from the environment, prefix IMG2IMG_. Durations in seconds, sizes in bytes."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        frozen=True,
        extra="forbid",
        hide_input_in_errors=True,
        allow_inf_nan=False,
    )

    # Addresses.
    grpc_host: str = Field("127.0.0.1", description="Address the api listens on.")
    grpc_port: int = Field(50051, ge=0, le=65535, description="Port of the api; 0: any free one.")
    http_host: str = Field("127.0.0.1", description="Address the gateway listens on.")
    http_port: int = Field(8080, ge=0, le=65535, description="Port of the gateway.")
    metrics_host: str = Field("127.0.0.1", description="Address of metrics and probes.")
    metrics_port: int = Field(
        9090,
        ge=0,
        le=65535,
        description="Port of /metrics, /livez and /readyz of every role. "
        "`local` takes it for the worker and the next two for api and gateway.",
    )
    api_address: str = Field(
        "127.0.0.1:50051",
        description="Where the gateway finds the api: host:port, or another form of a gRPC target "
        "(dns:///host:port, ipv4:address:port,address:port, unix:path). A list of addresses works "
        "without TLS only.",
    )
    api_ca_file: Path | None = Field(
        None,
        description="PEM certificates the gateway trusts when the api has TLS. Empty: no TLS.",
    )
    public_base_url: str = Field(
        "",
        description="Base of the links in answers. Empty: scheme and host of the HTTP request; "
        "over gRPC http:// and the gateway's own address, or loopback where the gateway listens on "
        "all addresses.",
    )
    playground: bool = Field(
        True, description="Serve the playground, a page at / of the gateway to try the service."
    )
    tls_cert_file: Path | None = Field(None, description="PEM certificate of the gRPC server.")
    tls_key_file: Path | None = Field(None, description="PEM key of the gRPC server.")

    # Engines beside us.
    nats_url: SecretStr = Field(
        SecretStr("nats://127.0.0.1:4222"),
        description="NATS servers, comma separated: nats://, tls://, ws:// or wss://. Each may "
        "hold `user:password@` or `token@`, percent-encoded.",
    )
    nats_user: str = Field("", description="User at NATS. Empty: that of nats_url, or none.")
    nats_password: SecretStr = Field(SecretStr(""), description="Password of nats_user.")
    nats_token: SecretStr = Field(SecretStr(""), description="Token for NATS instead of a user.")
    nats_creds_file: Path | None = Field(None, description="NATS credentials file.")
    nats_ca_file: Path | None = Field(
        None,
        description="PEM certificates that are trusted for NATS instead of the system's; NATS "
        "must then have TLS.",
    )
    nats_cert_file: Path | None = Field(
        None, description="PEM certificate of this client, for NATS that asks for one."
    )
    nats_key_file: Path | None = Field(None, description="PEM key of nats_cert_file.")
    nats_replicas: int = Field(1, ge=1, le=5, description="Replicas of streams and buckets.")
    s3_endpoint_url: str = Field(
        "http://127.0.0.1:8333",
        description="S3 endpoint: scheme, host and port, without a path and without the bucket.",
    )
    s3_region: str = Field(
        "us-east-1",
        description="S3 region. Where it is not set, at AWS: that of the endpoint's host, else "
        "AWS_REGION.",
    )
    s3_bucket: str = Field("img2img", description="Bucket of the service; created when missing.")
    s3_access_key: SecretStr = Field(
        SecretStr(""),
        description="S3 access key. Empty: the default chain of AWS finds credentials.",
    )
    s3_secret_key: SecretStr = Field(SecretStr(""), description="S3 secret key.")
    s3_session_token: SecretStr = Field(
        SecretStr(""), description="S3 session token, of temporary keys."
    )

    # Keys.
    api_keys_file: Path | None = Field(
        None, description="TOML file of hashed API keys; see `img2img-server keys`."
    )
    dev_key: bool = Field(
        False, description="Accept the API key `dev-key`; loopback only. `local` turns it on."
    )

    storage_keys: SecretStr = Field(
        SecretStr(""),
        description="Fernet keys, comma separated, that seal the S3 details of tenants: the first "
        "seals, all open. The same for api and worker; `local` makes one. Empty: tenants cannot "
        "store S3 details.",
    )

    # The model.
    model: str = Field(
        "", description="Diffusers directory or hub id. Empty: the model inside the package."
    )
    default_model: str = Field(
        "",
        description="Model of requests that name none. Empty: the one that workers announced, "
        "the first by name of several.",
    )
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|cuda(:[0-9]{1,3})?)$",
        description="auto, cpu, cuda or cuda:N.",
    )
    dtype: str = Field(
        "auto",
        pattern="^(auto|float32|float16|bfloat16)$",
        description="Number type of the model; auto: float32 on a CPU, bfloat16 on a GPU.",
    )
    max_batch_rows: int = Field(8, ge=1, le=256, description="Most samples denoised at once.")
    torch_threads: int = Field(0, ge=0, description="CPU threads of torch; 0: its own choice.")
    channels_last: bool = Field(
        True, description="Keep the networks' tensors channels last: faster where it was measured."
    )
    fuse_qkv: bool = Field(
        False, description="Compute queries, keys and values of the UNet in one product."
    )
    compile: str = Field(
        "off",
        pattern="^(off|regional|whole)$",
        description="How much of the UNet torch.compile gets; on a GPU `whole` is run as CUDA "
        "graphs. Batches are then filled up to a few sizes, and warm_up_sizes takes minutes.",
    )
    compile_cache_dir: Path | None = Field(
        None, description="Folder that keeps what was compiled. Empty: torch's own, in /tmp."
    )
    warm_up_sizes: str = Field(
        "512x512",
        pattern=r"^\s*(\d+x\d+\s*(,\s*\d+x\d+\s*)*)?$",
        description="Sizes, WIDTHxHEIGHT and comma separated, that are run before the worker is "
        "ready.",
    )
    vae_tile_pixels: int = Field(
        1024 * 1024,
        ge=1,
        description="Pictures of more pixels pass the autoencoder in overlapping tiles of its own "
        "size: less memory, small differences.",
    )
    tiny_vae: str = Field(
        "", description="Directory or hub id of a tiny autoencoder (TAESD). Empty: none."
    )
    tiny_vae_use: str = Field(
        "previews",
        pattern="^(previews|pictures)$",
        description="What the tiny autoencoder is for: better previews, or the pictures too, "
        "which is faster and costs fine detail.",
    )
    memory_limit_bytes: int = Field(
        0,
        ge=0,
        description="Most device memory for the intermediate results of a step; 0: what is "
        "free. Of a GPU: on a CPU nothing is measured, and this has no effect.",
    )
    lora_dir: Path | None = Field(
        None,
        description="Folder of LoRA files (.safetensors) that requests may name; a LoRA has the "
        "name of its file. Not together with fuse_qkv.",
    )
    safety_checker: str = Field(
        "opennsfw",
        pattern="^(opennsfw|model)$",
        description="What checks pictures: the classifier that comes with the service, or the "
        "safety checker that the model's directory brings, which runs on the CPU and decides by "
        "thresholds of its own.",
    )
    safety_threshold: float = Field(
        0.8, ge=0.0, le=1.0, description="Score from which a picture is blanked."
    )

    # Prompts.
    prompt_rewriter: str = Field(
        "rules",
        pattern="^(off|rules)$",
        description="What enhance_prompt does: rules add terms to the prompt; off: the prompt is "
        "used as sent, and the job has a warning.",
    )

    # Limits.
    queue_limit: int = Field(15, ge=1, description="Most unfinished jobs of a tenant.")
    max_message_bytes: int = Field(
        34 * 2**20, ge=2**20, le=2**31 - 1, description="Largest gRPC message, in and out."
    )
    max_image_bytes: int = Field(20_971_520, ge=1, description="Largest init image.")
    max_image_pixels: int = Field(64_000_000, ge=1, description="Largest init image in pixels.")
    rate_limit: int = Field(
        0,
        ge=0,
        description="Jobs that a key may make in a minute, at all apis together; 0: any number. "
        "`rate_limit` of a key's entry in the keys file comes before it.",
    )
    max_watchers: int = Field(1000, ge=1, description="Most open event streams of one api.")
    max_tenant_calls: int = Field(
        500, ge=1, description="Most open event streams and job requests of a tenant at one api."
    )
    max_http_requests: int = Field(
        2000, ge=1, description="Most open HTTP requests of one gateway, event streams included."
    )
    max_http_body_bytes: int = Field(
        128 * 2**20,
        ge=32 * 2**20,
        description="Most bytes of HTTP request bodies that one gateway holds at a time; to "
        "read and pass them on takes a few times as much memory. A body of more than 40,000 "
        "values, which would take far more, is refused.",
    )
    max_attempts: int = Field(5, ge=1, description="Times a job is tried before it fails.")
    outbound_allow: str = Field(
        "",
        description="Hosts and networks that caller-supplied addresses may name although they are "
        "not public, comma separated: `files.internal, 10.2.0.0/16`. Give api, gateway and workers "
        "the same.",
    )
    outbound_user_agent: str = Field(
        "",
        pattern=r"^[ -~]*$",
        description="User-Agent of requests to caller-supplied addresses, for example "
        "`img2img/0.1.0 (+https://example.com/contact)`; some servers refuse one without a "
        "contact. Empty: `img2img/` and the version.",
    )
    outbound_timeout_seconds: float = Field(10.0, gt=0, description="Longest init image download.")

    # Times.
    startup_timeout_seconds: float = Field(
        45.0,
        gt=0,
        description="How long a starting role tries to reach NATS and the bucket before it ends.",
    )
    wait_seconds: float = Field(30.0, ge=0, description="How long a POST waits for its job.")
    heartbeat_seconds: float = Field(
        15.0,
        ge=0,
        description="Silence of a gRPC event stream after which the api sends a heartbeat event, "
        "so that proxies do not cut the stream; 0: never.",
    )
    disconnect_grace_seconds: float = Field(
        15.0,
        ge=0,
        description="How long a job goes on after its Generate call broke. A WatchJob call within "
        "this time keeps the job, otherwise it is cancelled; 0: it is cancelled at once, also when "
        "another api has a stream of it open.",
    )
    ack_wait_seconds: float = Field(
        15.0, ge=0.5, description="Silence after which a worker's job goes to another one."
    )
    drain_seconds: float = Field(
        25.0, ge=0, description="How long running work may take when a role stops."
    )
    retention_hours: int = Field(24, ge=1, description="How long ended jobs and files are kept.")
    events_retention_seconds: float = Field(
        3600.0, ge=60, description="How long events can be replayed."
    )
    events_max_bytes: int = Field(2**30, ge=2**20, description="Most bytes of replayable events.")

    # The contract.
    legacy: bool = Field(False, description="Answer in the older form of the HTTP contract.")
    base64_inline: bool = Field(
        False,
        description="Put the strings of `base64` jobs into `output`, where their links would be. "
        "Files in a tenant's own storage keep their links: the service does not read there.",
    )
    cors_origins: str = Field(
        "*",
        description="Origins that browsers may call from, comma separated: `*` for all, `loopback` "
        "for pages of this machine. With `dev_key` it is `loopback` unless it is set, and pages of "
        "other origins are refused, for everybody knows that key.",
    )
    webhook_secret: SecretStr = Field(
        SecretStr(""),
        description="Signs webhooks: whsec_…; two apart by a space while one replaces the other.",
    )

    # The process.
    state_dir: Path = Field(Path(".img2img"), description="State folder of `local`.")
    log_level: str = Field("info", pattern="^(debug|info|warning|error)$", description="Log level.")
    log_format: str = Field(
        "auto",
        pattern="^(auto|json|console)$",
        description="Log format on stderr; auto: console on a terminal, else json.",
    )
    otlp_endpoint: str = Field(
        "",
        pattern="^(https?://.+)?$",
        description="OpenTelemetry collector that gets the traces by OTLP over gRPC, for example "
        "http://collector:4317. Empty: none. OTEL_TRACES_SAMPLER and its kin hold too.",
    )
    use_proxy_environment: bool = Field(
        False,
        description="Obey http_proxy, https_proxy, grpc_proxy, all_proxy and no_proxy for the "
        "gateway's connection to the api and for the export of traces. Default: connect directly.",
    )
    worker_name: str = Field("", description="Name of the worker. Empty: host name and process.")

    @field_validator("*", mode="before")
    @classmethod
    def _empty_path(cls, value: Any, info: ValidationInfo) -> Any:
        """Takes an empty path for one that is not set: Path("") would be the working directory."""
        field = cls.model_fields[str(info.field_name)]
        if _is_path(field) and isinstance(value, str) and not value.strip():
            return field.default
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _syntax(cls, value: Any, info: ValidationInfo) -> Any:
        text = value.get_secret_value() if isinstance(value, SecretStr) else value
        name, fault = str(info.field_name), ""
        if isinstance(text, str | Path):
            fault = setting_syntax.fault_of(name, str(text))
        elif isinstance(text, int | float):
            fault = setting_syntax.number_fault(name, text)
        if fault:
            raise ValueError(fault)
        return value

    @model_validator(mode="after")
    def _pairs(self) -> Self:
        """Checks what settings say together. Raises one error with a line for each mistake."""
        mistakes = []
        for pair in _TOGETHER:
            for name, other in (pair, pair[::-1]):
                if _is_set(getattr(self, other)) and not _is_set(getattr(self, name)):
                    mistakes.append(
                        f"{variable(name)}: is not set, and must be given together with "
                        f"{variable(other)}"
                    )
        if self.nats_user and _is_set(self.nats_token):
            mistakes.append(
                "IMG2IMG_NATS_TOKEN: cannot be used together with IMG2IMG_NATS_USER: unset one"
            )
        if _is_set(self.s3_session_token) and not _is_set(self.s3_access_key):
            mistakes.append(
                "IMG2IMG_S3_SESSION_TOKEN: belongs to IMG2IMG_S3_ACCESS_KEY, which is not set"
            )
        if self.lora_dir and self.fuse_qkv:
            mistakes.append(
                "IMG2IMG_LORA_DIR: does not work with IMG2IMG_FUSE_QKV, which fuses what a LoRA "
                "changes"
            )
        if self.api_ca_file and setting_syntax.lists_addresses(self.api_address):
            mistakes.append(
                "IMG2IMG_API_ADDRESS: with TLS (IMG2IMG_API_CA_FILE) it cannot list addresses, "
                "because a certificate is checked against one name: use a DNS name that has all "
                "of them, dns:///HOST:PORT"
            )
        if mistakes:
            raise ValueError("\n".join(mistakes))
        return self

    @property
    def has_open_dev_key(self) -> bool:
        """Whether the well-known key works."""
        return self.dev_key and not self.api_keys_file

    @property
    def browser_origins(self) -> str:
        """cors_origins; where it was not set and the well-known key works, `loopback`."""
        if self.has_open_dev_key and "cors_origins" not in self.model_fields_set:
            return "loopback"
        return self.cors_origins

    def refuse_open_dev_key(self, host: str) -> None:
        """Raises SettingsError when the well-known key would be open to the network at `host`."""
        if self.has_open_dev_key and not is_loopback(host):
            raise SettingsError(
                "IMG2IMG_API_KEYS_FILE: is not set; refusing to listen on "
                f"{host} with the well-known development key: set it or listen on 127.0.0.1"
            )

    @classmethod
    def load(cls, **overrides: object) -> Settings:
        """Reads the environment; overrides win.

        Raises:
            SettingsError: a value is wrong or an IMG2IMG_ name is unknown; lists all of them.
        """
        settings, mistakes, _ = cls.load_with_mistakes(**overrides)
        if mistakes:
            raise SettingsError(*mistakes)
        return settings

    @classmethod
    def load_with_mistakes(cls, **overrides: object) -> tuple[Settings, list[str], frozenset[str]]:
        """Reads the environment, and says what is wrong with it instead of raising.

        Returns:
            The settings, those that are wrong with their defaults; a sentence for each mistake; the
            names of the settings that are wrong.
        """
        mistakes = _unknown(cls.model_fields)
        wrong: dict[str, Any] = {}
        while True:
            try:
                settings = cls(**{**overrides, **wrong})
            except ValidationError as error:
                found: dict[str, Any] = {}
                for fault in error.errors(include_url=False):
                    mistakes += _sentences(fault, cls.model_fields)
                    for name in _fields_of(fault, cls.model_fields):
                        found[name] = cls.model_fields[name].default
                assert found.keys() - wrong.keys(), "each round takes a setting out"
                wrong |= found
            else:
                return settings, mistakes, frozenset(wrong)


def variable(name: str) -> str:
    """The environment variable of a setting."""
    return PREFIX + name.upper()


def _unknown(fields: Iterable[str]) -> list[str]:
    known = CLIENT_NAMES | {variable(name) for name in fields}
    mistakes = []
    for name in sorted(os.environ):
        if name.upper().startswith(PREFIX) and name.upper() not in known:
            near = difflib.get_close_matches(name.upper(), known, n=1, cutoff=0.8)
            hint = f"; is {near[0]} meant?" if near else ""
            mistakes.append(f"{name}: there is no such setting{hint}")
    return mistakes


def _is_set(value: Any) -> bool:
    return bool(value.get_secret_value() if isinstance(value, SecretStr) else value)


def _is_path(field: FieldInfo) -> bool:
    return Path in (get_args(field.annotation) or (field.annotation,))


def _fields_of(fault: ErrorDetails, fields: dict[str, FieldInfo]) -> list[str]:
    """The settings that an error of pydantic is about."""
    name = _name(fault)
    if name:
        return [name] if name in fields else []
    named = re.findall(rf"\b{PREFIX}([A-Z0-9_]+)", fault["msg"])
    return [each.lower() for each in named if each.lower() in fields]


def _name(fault: ErrorDetails) -> str:
    return str(fault["loc"][0]).lower().removeprefix(PREFIX.lower()) if fault["loc"] else ""


def _sentences(fault: ErrorDetails, fields: dict[str, FieldInfo]) -> list[str]:
    """Returns sentences for a pydantic error, with the value only where it cannot be a secret."""
    name, kind, context = _name(fault), fault["type"], fault.get("ctx", {})
    if kind == "value_error":
        lines = str(context["error"]).splitlines()
        return [f"{variable(name)}: {line}" for line in lines] if name else lines
    field = fields.get(name)
    text = fault["msg"]
    bounds = {
        "greater_than": "must be above {gt}",
        "greater_than_equal": "must be at least {ge}",
        "less_than": "must be below {lt}",
        "less_than_equal": "must be at most {le}",
    }
    if kind in bounds:
        text = bounds[kind].format(**context)
    elif kind == "finite_number":
        text = "must be a finite number"
    elif kind.startswith("int_"):
        text = "must be a whole number"
    elif kind.startswith("float_"):
        text = "must be a number"
    elif kind.startswith("bool_"):
        text = "must be true or false"
    elif kind == "string_pattern_mismatch":
        rule = setting_syntax.RULES.get(name)
        own = rule(str(fault["input"])) if rule else ""
        text = _choices(str(context["pattern"])) or own or f"must match {context['pattern']}"
    shown = repr(fault["input"])
    if field is None or SecretStr in (get_args(field.annotation) or (field.annotation,)):
        return [f"{variable(name)}: {text}"]
    return [f"{variable(name)}: {text}, not {shown if len(shown) <= 80 else shown[:77] + '...'}"]


def _choices(pattern: str) -> str:
    """Returns the values that a pattern such as ^(a|b|c)$ allows, as a phrase."""
    match = re.fullmatch(r"\^\(([\w|:()\[\]{},?-]+)\)\$", pattern)
    if not match:
        return ""
    *others, last = re.sub(r"(\w+)\(:.*?\)\?", r"\1|\1:N", match[1]).split("|")
    return f"must be {', '.join(others)} or {last}"


def is_loopback(host: str) -> bool:
    """Whether host names this machine only."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"
