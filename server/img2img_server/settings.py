"""Defines every setting of the service; no other module reads IMG2IMG_ variables.

Other variables are read where their libraries are used: AWS_* by storage/s3_credentials.py and
storage/s3_access.py, SSL_CERT_FILE by OpenSSL, HF_* by the hub's library, OTEL_* by OpenTelemetry,
GOMP_SPINCOUNT and OMP_* by OpenMP.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Self, get_args

from pydantic import (
    Field,
    PrivateAttr,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, SettingsConfigDict

from img2img_server.domain.params import MAX_SIDE_PIXELS
from img2img_server.domain.price import PATTERN as PRICE_PATTERN
from img2img_server.errors import OperatorError
from img2img_server.setting_files import read_bytes
from img2img_server.setting_names import PREFIX, Origin, in_words_of_settings, variable
from img2img_server.setting_syntax import (
    ApiAddress,
    BaseUrl,
    BucketName,
    Bytes,
    Count,
    Device,
    KeyPrefix,
    ListenHost,
    Networks,
    OptionalPath,
    Origins,
    OtlpEndpoint,
    Port,
    PublicGrpcAddress,
    S3Endpoint,
    Seconds,
    Sizes,
    StateDir,
    lists_addresses,
)

STREAM_PREFIX = "i2t_"  # of tokens that open the event stream of one job
DEV_KEY = "dev-key"  # the well-known development key, see Settings.dev_key
# Variables of the client's command `img2img`, which may run in the same shell.
CLIENT_NAMES = frozenset({"IMG2IMG_SERVER", "IMG2IMG_API_KEY", "IMG2IMG_PROFILE", "IMG2IMG_CONFIG"})
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


_TOGETHER = (
    ("tls_cert_file", "tls_key_file"),
    ("api_cert_file", "api_key_file"),
    ("nats_cert_file", "nats_key_file"),
    ("nats_user", "nats_password"),
    ("s3_access_key", "s3_secret_key"),
)
_NEEDS = {
    "tls_client_ca_file": "tls_cert_file",
    "api_cert_file": "api_ca_file",
    "lora_s3_prefix": "lora_dir",
}
_CONFLICTS = (
    (
        "lora_dir",
        ("fuse_qkv", "quantization", "gguf_file", "group_offload"),
        "which changes how the weights are kept that a LoRA changes",
    ),
    (
        "fuse_qkv",
        ("quantization", "gguf_file", "group_offload"),
        "which changes how the weights are kept that are fused",
    ),
    ("gguf_file", ("quantization",), "which would quantise the weights of the file again"),
    ("group_offload", ("compile",), "which needs the weights to stay on the device"),
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
        use_attribute_docstrings=True,
    )

    _origin: Origin = PrivateAttr(default_factory=Origin)

    # Addresses.
    grpc_host: ListenHost = "127.0.0.1"
    """Address the api listens on."""
    grpc_port: Port = 50051
    """Port of the api; 0: any free one."""
    http_host: ListenHost = "127.0.0.1"
    """Address the gateway listens on."""
    http_port: Port = 8080
    """Port of the gateway."""
    metrics_host: ListenHost = "127.0.0.1"
    """Address of metrics and probes."""
    metrics_port: Port = 9090
    """Port of /metrics, /livez and /readyz of every role. `local` uses it for the worker and the
    next two ports for api and gateway.
    """
    api_address: ApiAddress = "127.0.0.1:50051"
    """Where the gateway finds the api: host:port, or another form of a gRPC target
    (dns:///host:port, ipv4:address:port,address:port, unix:path). A list of addresses works without
    TLS only."""
    api_ca_file: OptionalPath = None
    """PEM certificates that the gateway trusts if the api uses TLS. Empty: no TLS."""
    api_cert_file: OptionalPath = None
    """PEM certificate of the gateway, for an api with `tls_client_ca_file`. It and api_ca_file are
    read again when they change."""
    api_key_file: OptionalPath = None
    """PEM key of api_cert_file."""
    public_base_url: BaseUrl = ""
    """Base of the links in responses. Empty: scheme and host of the HTTP request; over gRPC http://
    and the gateway's own address, or loopback where the gateway listens on all addresses."""
    public_grpc_address: PublicGrpcAddress = ""
    """gRPC address that callers use, such as grpc.example.com:443; the playground shows it. Empty:
    port 50051 of the gateway's host, and api_address with the development key."""
    public_grpc_tls: bool = False
    """Whether callers use TLS at public_grpc_address."""
    playground: bool = True
    """Serve the playground, a page at / of the gateway on which to try the service."""
    tls_cert_file: OptionalPath = None
    """PEM certificate of the gRPC server. The three TLS files are read again when they change."""
    tls_key_file: OptionalPath = None
    """PEM key of the gRPC server."""
    tls_client_ca_file: OptionalPath = None
    """PEM certificates of the authorities of clients (mutual TLS): without a certificate of theirs,
    clients of the gRPC server are refused. Empty: clients need no certificate."""

    # NATS and S3.
    nats_url: SecretStr = SecretStr("nats://127.0.0.1:4222")
    """NATS servers, comma separated: nats://, tls://, ws:// or wss://, with `user:password@` or
    `token@`, percent-encoded. All servers must have the same credentials."""
    nats_user: str = ""
    """User at NATS. Empty: the user in nats_url, or none."""
    nats_password: SecretStr = SecretStr("")
    """Password of nats_user."""
    nats_token: SecretStr = SecretStr("")
    """Token for NATS instead of a user."""
    nats_creds_file: OptionalPath = None
    """NATS credentials file."""
    nats_ca_file: OptionalPath = None
    """PEM certificates that are trusted for NATS instead of the system's; NATS must then use TLS.
    """
    nats_cert_file: OptionalPath = None
    """PEM certificate of this client, for NATS servers that require one."""
    nats_key_file: OptionalPath = None
    """PEM key of nats_cert_file."""
    nats_replicas: int = Field(1, ge=1, le=5)
    """Replicas of streams and buckets."""
    s3_endpoint_url: S3Endpoint = "http://127.0.0.1:8333"
    """S3 endpoint: scheme, host and port, without a path and without the bucket."""
    s3_region: str = "us-east-1"
    """S3 region. If it is not set, AWS endpoints use the region in the host name, else AWS_REGION.
    """
    s3_bucket: BucketName = "img2img"
    """Bucket of the service; created when missing."""
    s3_access_key: SecretStr = SecretStr("")
    """S3 access key. Empty: the default chain of AWS finds credentials."""
    s3_secret_key: SecretStr = SecretStr("")
    """S3 secret key."""
    s3_session_token: SecretStr = SecretStr("")
    """S3 session token of temporary keys."""
    s3_wait_seconds: Seconds = Field(600.0, ge=0)
    """How long a finished image waits while the bucket cannot be used; then its job fails."""
    s3_wait_bytes: Bytes = Field(256 * 2**20, ge=2**20)
    """A worker pulls no more jobs while its finished images that are not stored yet have this many
    bytes.
    """

    # Keys.
    api_keys_file: OptionalPath = None
    """TOML file of hashed API keys; see `img2img-server keys`."""
    dev_key: bool = False
    """Accept the API key `dev-key`; loopback only. `local` turns it on."""

    storage_keys: SecretStr = SecretStr("")
    """Fernet keys, comma separated, that encrypt the S3 details of tenants: the first key encrypts,
    all keys decrypt. Give api and worker the same keys; `local` creates one. Empty: tenants cannot
    store S3 details.
    """

    stream_token_keys: SecretStr = SecretStr("")
    """Keys, comma separated, that sign the tokens with which browsers watch a job: the first key
    signs, all keys verify. Each has at least 32 characters. Give every api the same keys; `local`
    creates one. Empty: no tokens are made.
    """
    stream_token_seconds: Seconds = Field(3600.0, ge=60, le=86_400)
    """How long a token of an event stream can open the stream."""

    # The model.
    model: str = ""
    """Diffusers directory, single file (.safetensors), or hub id, `owner/name` or
    `owner/name@revision`. Empty: the model inside the package."""
    model_name: str = Field("", max_length=128)
    """Name under which the worker offers the model. Empty: the model's own name."""
    models_file: OptionalPath = None
    """TOML or JSON file with the models that the worker serves, instead of `IMG2IMG_MODEL`; see
    [several models](models.md#several-models-on-one-worker). It keeps as many loaded as fit. The
    worker logs a change of the file, and reads it when it starts again."""
    models_memory_bytes: Bytes = Field(0, ge=0)
    """Most bytes of weights that a worker with a models file keeps loaded. 0: it loads another
    model if a fifth of the memory of the device (on a CPU: of the machine) then remains free."""
    model_swap_seconds: Seconds = Field(30.0, ge=0)
    """How long requests for a model that is not loaded may wait while all loaded models have
    requests, and there is no room for another one."""
    model_parts_dir: OptionalPath = None
    """Folder with parts of models, for single files that do not hold all parts: FAMILY/PART, each
    in diffusers' layout, such as sd/vae, or files such as t5xxl_fp16.safetensors. The folder of a
    model with all parts works as well."""
    allow_pickles: bool = False
    """Load weights from pickles (.bin, .ckpt) where a model has no safetensors. They are read with
    PyTorch's `weights_only`, which runs no code of the file that is known to be dangerous."""
    default_model: str = ""
    """Model of requests without a model. Empty: the first model that workers serve, by its place
    in their catalogue and by name."""
    unserved_model_hours: float = Field(168.0, ge=0, le=24 * 366)
    """Hours after which a model that no worker serves leaves the list of models, so that requests
    for it are refused. 0: never."""
    default_scheduler: str = ""
    """Scheduler of requests without a scheduler. Empty: the model's own default."""
    default_num_inference_steps: int = Field(0, ge=0, le=1000)
    """Number of steps of requests without one; 0: the model's own default."""
    default_guidance_scale: float = Field(-1.0, ge=-1, le=30)
    """Guidance scale of requests without one; -1: the model's own default."""
    default_strength: float = Field(-1.0, ge=-1, le=1)
    """Strength of requests without one; -1: the model's own default."""
    native_size: int = Field(0, ge=0, le=MAX_SIDE_PIXELS)
    """Default size of images: the side in pixels of a square with their area; 0: the
    model's own."""
    device: Device = "auto"
    """auto, cpu, cuda or cuda:N."""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """Number type of the model; auto: float32 on a CPU, bfloat16 on a GPU."""
    max_batch_size: int = Field(8, ge=1, le=256)
    """Largest batch of a denoising step, in forwards of the model: a sample costs one, with
    guidance two. A worker stops pulling jobs when its jobs fill a batch.
    """
    torch_threads: Count = Field(0, ge=0)
    """CPU threads of torch; 0: torch's default."""
    channels_last: bool = True
    """Keep the networks' tensors in the channels-last layout, which was faster on all measured
    devices.
    """
    fuse_qkv: bool = False
    """Compute queries, keys and values of the denoiser in one matrix product."""
    compile: Literal["off", "regional", "whole"] = "off"
    """The part of the denoiser that torch.compile compiles; on a GPU `whole` also uses CUDA graphs.
    Batches are then padded to a few sizes, and the warm-up takes minutes.
    """
    compile_cache_dir: OptionalPath = None
    """Folder that caches compiled code. Empty: torch's default in /tmp."""
    warm_up_sizes: Sizes = "512x512"
    """Image sizes, WIDTHxHEIGHT and comma separated, that a worker runs once before it is ready."""
    vae_tile_pixels: Count = Field(1024 * 1024, ge=1)
    """Images of more pixels are encoded and decoded in overlapping tiles, which needs less memory
    and changes pixels slightly.
    """
    vae_dir: OptionalPath = None
    """Folder of an autoencoder, in diffusers' layout, that is used instead of the model's own: its
    config.json and weights, or a model that has them in a folder `vae`."""
    tiny_vae: str = ""
    """Directory or hub id of a tiny autoencoder (TAESD). Empty: none."""
    tiny_vae_use: Literal["previews", "images"] = "previews"
    """Use of the tiny autoencoder: for better previews only, or also for the images, which is
    faster but loses fine detail.
    """
    memory_limit_bytes: Bytes = Field(0, ge=0)
    """Most device memory for the intermediate results of a step; 0: all free memory. No effect on a
    CPU, whose memory is not measured."""
    lora_dir: OptionalPath = None
    """Folder of LoRA files (.safetensors); requests name a LoRA by its file name. New files are
    offered without a restart. Cannot be combined with fuse_qkv, IMG2IMG_QUANTIZATION, gguf_file or
    group_offload."""
    lora_s3_prefix: KeyPrefix = ""
    """Prefix of LoRA files in the bucket s3_bucket, such as loras/. The worker copies the files
    directly below it into lora_dir, every 30 seconds, and deletes copies of files that the bucket
    has no more; it needs s3:ListBucket. Empty: none."""
    embeddings_dir: OptionalPath = None
    """Folder of textual inversion embeddings (.safetensors) for models of Stable Diffusion 1.x, 2.x
    and XL and LCM; prompts name the token of a file. New files are offered without a restart."""
    text_encoder_placement: Literal["device", "offload", "cpu"] = "device"
    """Where text encoders are kept. device: on the device; offload: on the host, and they move to
    the device to encode new prompts; cpu: on the host, where they also run. Prompts are cached
    in each case."""
    quantization: Literal["off", "int8", "fp8"] = "off"
    """Keep the linear weights of the denoiser in 8 bits and widen them for each use. Needs the
    extra `quantization` of the package."""
    gguf_file: OptionalPath = None
    """GGUF file with the weights of the denoiser, used instead of the model's own. Needs the extra
    `quantization` of the package."""
    group_offload: bool = False
    """Keep the denoiser on the host and move its blocks to the GPU one after the other as they run:
    for models that do not fit the GPU, at the cost of speed. Cannot be
    combined with IMG2IMG_COMPILE."""
    safety_checker: Literal["opennsfw", "model"] = "opennsfw"
    """The safety checker: the classifier that comes with the service, or the safety checker in
    the model's directory, which runs on the CPU with its own thresholds."""
    safety_threshold: float = Field(0.8, ge=0.0, le=1.0)
    """Score from which an image is replaced by a black one."""

    # Prompts.
    prompt_rewriter: Literal["off", "rules"] = "rules"
    """Effect of enhance_prompt: rules add terms to the prompt; off: the prompt is used as sent, and
    the job has a warning."""

    device_second_price: str = Field("", pattern=PRICE_PATTERN)
    """Price of a second of device time and its currency, for example 0.0004 EUR: for EstimateJob
    and GetUsage. Empty: no price."""

    # Limits.
    queue_limit: Count = Field(15, ge=1)
    """Most unfinished jobs of a tenant."""
    max_message_bytes: int = Field(34 * 2**20, ge=2**20, le=2**31 - 1)
    """Largest gRPC message, in and out."""
    max_request_bytes: Bytes = Field(256 * 2**20, ge=2**20)
    """Most bytes of gRPC requests that one api holds at a time, at least twice max_message_bytes. A
    request counts as one of max_message_bytes until it has arrived. A tenant holds no more than it
    leaves free."""
    max_grpc_connections: Count = Field(2000, ge=1)
    """Most open connections to one api. An address has no more than it leaves free."""
    max_side_pixels: int = Field(1536, ge=256, le=MAX_SIDE_PIXELS)
    """Largest width and height of images over gRPC and /v1, if the model's own limit is not lower;
    the calls of the HTTP contract accept up to 1024. `max_payload` of NATS must hold an image of
    that size, 3 bytes a pixel: 8 MB for 1536, 13 MB for 2048. Messages have at most 32 MiB, which
    no image below 3338 exceeds."""
    max_image_bytes: Bytes = Field(20_971_520, ge=1)
    """Largest init image."""
    max_image_pixels: Count = Field(64_000_000, ge=1)
    """Largest init image in pixels."""
    decode_processes: Count = Field(0, ge=0, le=64)
    """Processes of an api or a worker that decode init images; 0: one for each CPU, but 2 to 4. A
    tenant uses all but one of them at most.
    """
    decode_memory_bytes: Bytes = Field(448 * 2**20, ge=64 * 2**20)
    """Memory for the init images that an api or a worker decodes at a time. A tenant uses seven
    eighths of it at most, and an image that needs more than that is rejected.
    """
    decode_cpu_seconds: Seconds = Field(1.0, ge=0.05)
    """CPU time that an init image may take to decode, and a fifth of that more for each megapixel.
    Beyond it the image is rejected. Ordinary images take a tenth of it; raise it on slow CPUs.
    """
    max_fetches: Count = Field(64, ge=2)
    """Most downloads of init images under way in one api, retries included. A tenant has three
    quarters of them at most.
    """
    max_fetched_bytes: Bytes = Field(128 * 2**20, ge=32 * 2**20)
    """Most bytes of downloaded init images, and of uploads that are read, that one api holds at a
    time. A tenant holds three quarters of them at most.
    """
    admission_wait_seconds: Seconds = Field(20.0, ge=0)
    """Longest wait of a request for a process or memory that decodes its init image, or for a
    download; then it is refused with `SERVER_BUSY`.
    """
    upload_bytes: Bytes = Field(0, ge=0)
    """Most bytes of the init images that a tenant keeps as uploads; 0: no uploads. With uploads,
    the api needs the bucket, as workers do. `local` sets 1 GiB if it is not set."""
    upload_hours: int = Field(24, ge=1, le=87_600)
    """How long an upload is kept."""
    upload_endpoint_url: S3Endpoint = ""
    """Address of the S3 server in the URLs to which callers send uploads. Empty: s3_endpoint_url.
    """
    rate_limit: Count = Field(0, ge=0)
    """Jobs that a key may make in a minute, at all apis together; 0: any number. The limit in a
    key's entry of the keys file takes precedence."""
    max_watchers: Count = Field(1000, ge=1)
    """Most open event streams of one api. It keeps a quarter more for tenants that have few."""
    max_tenant_calls: Count = Field(500, ge=1)
    """Most open event streams and job requests of a tenant at one api."""
    max_http_requests: Count = Field(2000, ge=1)
    """Most open HTTP connections of one gateway, event streams included. A tenant, and an address
    without a key, has no more than it leaves free."""
    max_http_body_bytes: Bytes = Field(128 * 2**20, ge=32 * 2**20)
    """Most bytes of HTTP request bodies with a valid key that one gateway holds at a time; parsing
    and forwarding them takes a few times as much memory. A tenant holds no more than it leaves
    free. Bodies of more than 40,000 JSON values are rejected,
    because they would take far more.
    """
    max_attempts: Count = Field(5, ge=1)
    """Most attempts at a job before it fails."""
    outbound_allow: str = ""
    """Hosts and networks that caller-supplied addresses may name although they are not public,
    comma separated: `files.internal, 10.2.0.0/16`. Give api, gateway and workers the same. `none`
    lists nothing, like the empty default; but without a keys file, `local` lists the addresses of
    its machine unless this is set."""
    outbound_user_agent: str = Field("", pattern=r"^[ -~]*$")
    """User-Agent of requests to caller-supplied addresses, for example `img2img/0.1.0
    (+https://example.com/contact)`; some servers refuse one without a contact. Empty: `img2img/`
    and the version."""
    outbound_timeout_seconds: Seconds = Field(10.0, gt=0)
    """Longest init image download."""

    # Times.
    startup_timeout_seconds: Seconds = Field(45.0, gt=0)
    """How long a starting role tries to connect to NATS and the bucket before it exits."""
    wait_seconds: Seconds = Field(30.0, ge=0)
    """How long a POST waits for its job."""
    heartbeat_seconds: Seconds = Field(15.0, ge=0)
    """Silence of a gRPC event stream after which the api sends a heartbeat event, so that proxies
    do not cut the stream; 0: never."""
    disconnect_grace_seconds: Seconds = Field(15.0, ge=0)
    """How long a job continues after its Generate call broke. A WatchJob call within this time
    keeps the job, otherwise it is cancelled; 0: it is cancelled at once, even if another api has an
    open stream of the job.
    """
    ack_wait_seconds: Seconds = Field(15.0, ge=0.5)
    """Time without a message from a worker after which its job is redelivered to another worker."""
    drain_seconds: Seconds = Field(25.0, ge=0)
    """How long running work may take when a role stops."""
    retention_hours: int = Field(24, ge=1, le=87_600)
    """How long ended jobs and files are kept."""
    events_retention_seconds: Seconds = Field(3600.0, ge=60)
    """How long the events of an ended job can be replayed."""
    events_max_bytes: Bytes = Field(2**30, ge=2**20)
    """Most bytes of replayable events. The ended jobs of a tenant may use as many as are free, so
    one tenant can use half of them.
    """

    # The HTTP contract.
    legacy: bool = False
    """Respond in the older format of the HTTP contract."""
    base64_inline: bool = False
    """Put the base64 texts of `base64` jobs into `output` instead of links. Files in a tenant's own
    storage keep their links, since the service does not read that storage.
    """
    trusted_proxies: Networks = ""
    """Addresses and networks of proxies in front of the gateway, comma separated: `10.0.0.0/8`.
    Only their X-Forwarded-For and X-Forwarded-Proto are used. Empty: proxies on this machine.
    Without the addresses of an ingress here, all its clients share the limits of one address."""
    cors_origins: Origins = "*"
    """Origins that browsers may call from, comma separated: `*` for all, `loopback` for pages of
    this machine. With `dev_key` the default is `loopback`, and pages of other origins are rejected,
    because that key is public.
    """
    webhook_secret: SecretStr = SecretStr("")
    """Secret that signs webhooks, whsec_…. Give two, separated by a space, while you replace one.
    """
    webhook_secrets_file: OptionalPath = None
    """TOML file with webhook secrets by tenant, such as `shop = ["whsec_…"]`; a webhook is signed
    with all of its tenant's. Tenants that it does not name have `webhook_secret`. The file is read
    again when it changes."""

    # The process.
    state_dir: StateDir = Path(".img2img")
    """State folder of `local`."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Log level."""
    log_format: Literal["auto", "json", "console"] = "auto"
    """Log format on stderr; auto: console on a terminal, else json."""
    otlp_endpoint: OtlpEndpoint = ""
    """OpenTelemetry collector that gets the traces by OTLP over gRPC, for example
    http://collector:4317. Empty: none. OTEL_TRACES_SAMPLER and the other OTEL_ variables apply too.
    """
    use_proxy_environment: bool = False
    """Use http_proxy, https_proxy, grpc_proxy, all_proxy and no_proxy for the gateway's connection
    to the api and for the export of traces. Default: connect directly."""
    worker_name: str = ""
    """Name of the worker. Empty: host name and process."""

    @field_validator("*", mode="after")
    @classmethod
    def _one_line(cls, value: Any) -> Any:
        """Rejects control characters, such as the line break at the end of a secret file."""
        text = value.get_secret_value() if isinstance(value, SecretStr) else value
        if isinstance(text, str | Path) and _CONTROL.search(str(text)):
            raise ValueError("must not have line breaks or other control characters")
        return value

    @field_validator("default_guidance_scale", "default_strength")
    @classmethod
    def _own_or_given(cls, value: float) -> float:
        """Rejects values below 0, which no request may have, except -1."""
        if -1 < value < 0:
            raise ValueError("must be -1, for the model's own, or at least 0")
        return value

    @model_validator(mode="after")
    def _pairs(self) -> Self:
        """Checks settings against each other. Raises one error with a line for each mistake."""
        is_set = {name for name in type(self).model_fields if _is_set(getattr(self, name))}
        mistakes = [
            f"{variable(name)}: is not set, and must be given together with {variable(other)}"
            for pair in _TOGETHER
            for name, other in (pair, pair[::-1])
            if other in is_set and name not in is_set
        ]
        if {"nats_user", "nats_token"} <= is_set:
            mistakes.append(
                "IMG2IMG_NATS_TOKEN: cannot be used together with IMG2IMG_NATS_USER: unset one"
            )
        if "s3_session_token" in is_set and "s3_access_key" not in is_set:
            mistakes.append(
                "IMG2IMG_S3_SESSION_TOKEN: belongs to IMG2IMG_S3_ACCESS_KEY, which is not set"
            )
        mistakes += [
            f"{variable(name)}: cannot be used together with {variable('models_file')}: unset one"
            for name in ("model", "model_name")
            if {name, "models_file"} <= is_set
        ]
        mistakes += self.conflicts()
        if self.api_ca_file and lists_addresses(self.api_address):
            mistakes.append(
                "IMG2IMG_API_ADDRESS: with TLS (IMG2IMG_API_CA_FILE) it cannot list addresses, "
                "because a certificate is checked against one name: use a DNS name that has all "
                "of them, dns:///HOST:PORT"
            )
        if mistakes:
            raise ValueError("\n".join(mistakes))
        return self

    @property
    def origin(self) -> Origin:
        """Where the values come from, for sentences about them."""
        return self._origin

    def of_entry(self, origin: Origin, values: Mapping[str, Any]) -> Self:
        """Returns a copy with the values of an entry of a file."""
        own = self.model_copy(update=values)
        own._origin = origin
        return own

    def conflicts(self) -> list[str]:
        """Returns a sentence for each two settings of the model that do not work together, and for
        each that has no effect alone.
        """
        alone = [
            f"{variable(name)}: has no effect without {variable(base)}"
            for name, base in _NEEDS.items()
            if _is_set(getattr(self, name)) and not _is_set(getattr(self, base))
        ]
        return alone + [
            f"{variable(name)}: does not work with {variable(other)}, {why}"
            for name, others, why in _CONFLICTS
            for other in others
            if _is_on(getattr(self, name)) and _is_on(getattr(self, other))
        ]

    @property
    def has_open_dev_key(self) -> bool:
        """Whether the well-known development key is accepted."""
        return self.dev_key and not self.api_keys_file

    @property
    def browser_origins(self) -> str:
        """The setting cors_origins, or `loopback` if it is not set and the development key is
        accepted.
        """
        if self.has_open_dev_key and "cors_origins" not in self.model_fields_set:
            return "loopback"
        return self.cors_origins

    @property
    def trusted_proxy_networks(self) -> list[str]:
        """The entries of the setting trusted_proxies, or this machine."""
        entries = [entry.strip() for entry in self.trusted_proxies.split(",")]
        return list(filter(None, entries)) or ["127.0.0.1"]

    def read_file(self, name: str) -> bytes:
        """Returns the content of the file that a setting names.

        Raises:
            SettingsError: The file cannot be read.
        """
        path = getattr(self, name)
        try:
            return read_bytes(path)
        except OSError as error:
            reason = f"{variable(name)}: {path} cannot be read: {error.strerror}"
            raise SettingsError(reason) from error

    def refuse_open_dev_key(self, host: str) -> None:
        """Raises SettingsError if other machines could use the well-known key through `host`."""
        if self.has_open_dev_key and not is_loopback(host):
            raise SettingsError(
                "IMG2IMG_API_KEYS_FILE: is not set; refusing to listen on "
                f"{host} with the well-known development key: set it or listen on 127.0.0.1"
            )

    @classmethod
    def load(cls, **overrides: object) -> Settings:
        """Reads the environment; overrides win.

        Raises:
            SettingsError: A value is wrong or an IMG2IMG_ name is unknown. Lists all mistakes.
        """
        settings, mistakes, _ = cls.load_with_mistakes(**overrides)
        if mistakes:
            raise SettingsError(*mistakes)
        return settings

    @classmethod
    def load_with_mistakes(cls, **overrides: object) -> tuple[Settings, list[str], frozenset[str]]:
        """Reads the environment, and returns its mistakes instead of raising.

        Returns:
            The settings, with defaults in place of wrong values; a sentence for each mistake; the
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


def with_variables(text: str) -> str:
    """Returns a description with the variables of settings in place of the names of fields.

    A name without an underscore is also a plain word, so descriptions have its variable.
    """
    names = "|".join(name for name in Settings.model_fields if "_" in name)
    spelt = rf"(?P<mark>`?)(?<![\w./-])(?P<name>{names}|{PREFIX}[A-Z0-9_]+)(?![\w/])(?P=mark)"
    return re.sub(spelt, lambda found: f"`{variable(found['name'].removeprefix(PREFIX))}`", text)


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


def _is_on(value: Any) -> bool:
    return _is_set(value) and value != "off"


def _fields_of(fault: ErrorDetails, fields: dict[str, FieldInfo]) -> list[str]:
    """Returns the settings that a pydantic error is about."""
    name = _name(fault)
    if name:
        return [name] if name in fields else []
    named = re.findall(rf"\b{PREFIX}([A-Z0-9_]+)", fault["msg"])
    return [each.lower() for each in named if each.lower() in fields]


def _name(fault: ErrorDetails) -> str:
    return str(fault["loc"][0]).lower().removeprefix(PREFIX.lower()) if fault["loc"] else ""


def _sentences(fault: ErrorDetails, fields: dict[str, FieldInfo]) -> list[str]:
    """Returns sentences for a pydantic error, with the value only where it cannot be a secret."""
    name = _name(fault)
    if fault["type"] == "value_error":
        lines = str(fault["ctx"]["error"]).splitlines()
        return [f"{variable(name)}: {line}" for line in lines] if name else lines
    message = fault["msg"].partition(", unable to")[0]
    sentence = f"{variable(name)}: {in_words_of_settings(message)}"
    field = fields.get(name)
    if field is None or SecretStr in (get_args(field.annotation) or (field.annotation,)):
        return [sentence]
    shown = repr(fault["input"])
    return [f"{sentence}, not {shown if len(shown) <= 80 else shown[:77] + '...'}"]


def is_loopback(host: str) -> bool:
    """Returns whether a host names this machine only."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"
