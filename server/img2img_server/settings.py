"""Every setting of the service. Nothing else reads the environment."""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path
from typing import Self

from pydantic import Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

PREFIX = "IMG2IMG_"
DEV_KEY = "dev-key"  # the well-known development key, see Settings.dev_key
# Of the command `img2img`: somebody may have both in one shell.
CLIENT_NAMES = frozenset({"IMG2IMG_SERVER", "IMG2IMG_API_KEY"})


class SettingsError(Exception):
    """The environment is wrong; the sentence lists every mistake."""


class Settings(BaseSettings):
    """Settings from the environment, prefix IMG2IMG_. Durations in seconds, sizes in bytes."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid")

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
    api_address: str = Field("127.0.0.1:50051", description="Where the gateway finds the api.")
    api_ca_file: Path | None = Field(
        None,
        description="PEM certificates the gateway trusts when the api has TLS. Empty: no TLS.",
    )
    public_base_url: str = Field(
        "",
        description="Base of the links in answers. Empty: scheme and host of the HTTP request; "
        "over gRPC http:// and the gateway's own address.",
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
    s3_endpoint_url: str = Field("http://127.0.0.1:8333", description="S3 endpoint.")
    s3_region: str = Field("us-east-1", description="S3 region.")
    s3_bucket: str = Field("img2img", description="Bucket of the service; created when missing.")
    s3_access_key: SecretStr = Field(SecretStr(""), description="S3 access key.")
    s3_secret_key: SecretStr = Field(SecretStr(""), description="S3 secret key.")

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
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N.")
    dtype: str = Field("auto", description="auto, float32, float16 or bfloat16.")
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
        pattern="^(off|rules|model)$",
        description="What enhance_prompt does: nothing but a warning, terms added by rules, or a "
        "language model on the worker. The same for api and worker.",
    )
    prompt_model: str = Field(
        "", description="Directory of the language model: text-to-text or causal, by transformers."
    )
    prompt_template: str = Field(
        "{prompt}", description="What the language model is asked, with {prompt} in it."
    )

    # Limits.
    queue_limit: int = Field(15, ge=1, description="Most unfinished jobs of a tenant.")
    max_message_bytes: int = Field(
        34 * 2**20, ge=2**20, description="Largest gRPC message, in and out."
    )
    max_image_bytes: int = Field(20_971_520, ge=1, description="Largest init image.")
    max_image_pixels: int = Field(50_000_000, ge=1, description="Largest init image in pixels.")
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
        "not public, comma separated: `files.internal, 10.2.0.0/16`.",
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
        "this time keeps the job, otherwise it is cancelled; 0: it is cancelled at once.",
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
    log_format: str = Field("auto", pattern="^(auto|json|console)$", description="Log format.")
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

    @model_validator(mode="after")
    def _pairs(self) -> Self:
        if bool(self.tls_cert_file) != bool(self.tls_key_file):
            raise ValueError("tls_cert_file and tls_key_file must be given together")
        if bool(self.nats_cert_file) != bool(self.nats_key_file):
            raise ValueError("nats_cert_file and nats_key_file must be given together")
        if bool(self.nats_user) != bool(self.nats_password.get_secret_value()):
            raise ValueError("nats_user and nats_password must be given together")
        if self.nats_user and self.nats_token.get_secret_value():
            raise ValueError("nats_token and nats_user exclude each other")
        if (self.prompt_rewriter == "model") != bool(self.prompt_model):
            raise ValueError("prompt_model belongs to prompt_rewriter=model, and it to that")
        if self.lora_dir and self.fuse_qkv:
            raise ValueError("lora_dir does not work with fuse_qkv: it fuses what a LoRA changes")
        if "{prompt}" not in self.prompt_template:
            raise ValueError("prompt_template must have {prompt} in it")
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
                f"refusing to listen on {host} with the well-known development key: "
                "set IMG2IMG_API_KEYS_FILE or listen on 127.0.0.1"
            )

    @classmethod
    def load(cls, **overrides: object) -> Settings:
        """Reads the environment; overrides win.

        Raises:
            SettingsError: a value is wrong or an IMG2IMG_ name is unknown; lists all of them.
        """
        known = CLIENT_NAMES | {PREFIX + name.upper() for name in cls.model_fields}
        mistakes = [
            f"{name}: there is no such setting"
            for name in sorted(os.environ)
            if name.upper().startswith(PREFIX) and name.upper() not in known
        ]
        try:
            settings = cls(**overrides)  # type: ignore[arg-type]
        except ValidationError as error:
            for fault in error.errors(include_input=False, include_url=False):
                field = "_".join(str(part) for part in fault["loc"])
                name = PREFIX + field.upper() if field else "settings"
                mistakes.append(f"{name}: {fault['msg']}")
        if mistakes:
            raise SettingsError("wrong settings:\n  " + "\n  ".join(mistakes))
        return settings


def is_loopback(host: str) -> bool:
    """Whether host names this machine only."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
