# One image for all roles; the role is the argument: api | gateway | worker.
#
#   docker build --build-arg BASE_DIGEST=sha256:… --target slim -t img2img-service:0.1.0-slim .
#   docker build --build-arg BASE_DIGEST=sha256:… -t img2img-service:0.1.0 .
#
# The first one is for api and gateway and has no torch, the second one is for all three.
#
# The image runs as a user without privileges on a read-only root file system; a worker needs a
# writable /tmp. torch's wheels contain CUDA, so the base is plain Python for any host with a
# driver. The role `local` does not run in containers, so its NATS and S3 servers are not installed.

ARG BASE_IMAGE=docker.io/library/python:3.11-slim-bookworm
# The digest of the exact base image, sha256:…; docs/operations.md says how to look it up. The build
# fails without a digest, unless UNPINNED_BASE=yes.
ARG BASE_DIGEST=
ARG UNPINNED_BASE=

FROM ${BASE_IMAGE}${BASE_DIGEST:+@${BASE_DIGEST}} AS base


# This stage installs the packages. Only its /opt/img2img becomes part of an image.
FROM base AS slim-build
ARG BASE_IMAGE
ARG BASE_DIGEST
ARG UNPINNED_BASE
RUN if [ -z "${BASE_DIGEST}" ] && [ "${UNPINNED_BASE}" != yes ]; then \
      echo "BASE_DIGEST is not set, so ${BASE_IMAGE} can be another image at every build. Set it with" \
        "--build-arg BASE_DIGEST=sha256:…, or accept any base with --build-arg UNPINNED_BASE=yes." >&2; \
      exit 1; \
    fi
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
RUN python3 -m venv /opt/pip \
 && python3 -m venv --without-pip /opt/img2img
WORKDIR /src
# Dependencies come first, because they change less often than the code. Every file must have a known
# hash. Only wheels are used, so nothing is compiled. The secret `pip` is a pip.conf for an index of your
# own.
COPY requirements requirements
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    /opt/pip/bin/pip install --quiet --only-binary :all: --require-hashes --no-deps \
    -r requirements/build.txt \
 && /opt/pip/bin/pip --python /opt/img2img install --quiet --only-binary :all: --require-hashes --no-deps \
    -r requirements/server.txt
COPY . .
RUN /opt/pip/bin/pip wheel --quiet --no-index --no-deps --no-build-isolation --wheel-dir /tmp/wheel ./client . \
 && /opt/pip/bin/pip --python /opt/img2img install --quiet --no-index --no-deps /tmp/wheel/*.whl \
 && rm -r /tmp/wheel \
 && /opt/img2img/bin/img2img-server --version

FROM slim-build AS full-build
# For another build of torch than PyPI's, which is the one for CUDA: TORCH="-c constraints.txt torch" and
# the index in pip.conf.
ARG TORCH="--require-hashes --no-deps -r requirements/torch.txt"
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    /opt/pip/bin/pip --python /opt/img2img install --quiet --only-binary :all: --require-hashes --no-deps \
    -r requirements/worker.txt \
 && /opt/pip/bin/pip --python /opt/img2img install --quiet --only-binary :all: ${TORCH} \
 && /opt/pip/bin/pip --python /opt/img2img check


# The parts that both images share.
FROM base AS runtime
ARG VERSION=0.1.0
ARG REVISION=unknown
ARG CREATED=1970-01-01T00:00:00Z
ARG BASE_IMAGE
ARG BASE_DIGEST
LABEL org.opencontainers.image.title="img2img-service" \
      org.opencontainers.image.description="Image-to-image diffusion as a gRPC service" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.source="https://git.example.com/platform/img2img" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}" \
      org.opencontainers.image.base.name="${BASE_IMAGE}" \
      org.opencontainers.image.base.digest="${BASE_DIGEST}"
# Roles listen on all addresses, because loopback is not reachable from outside a container. Caches
# of libraries must be in a writable folder.
ENV PATH=/opt/img2img/bin:$PATH \
    PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp HF_HOME=/tmp/huggingface \
    IMG2IMG_GRPC_HOST=0.0.0.0 IMG2IMG_HTTP_HOST=0.0.0.0 IMG2IMG_METRICS_HOST=0.0.0.0
WORKDIR /
# A new volume of Compose gets the owner of the folder that it is mounted on.
RUN install -d -o 65532 -g 65532 /models
USER 65532:65532
EXPOSE 50051 8080 9090
STOPSIGNAL SIGTERM
ENTRYPOINT ["img2img-server"]

FROM runtime AS slim
COPY --from=slim-build /opt/img2img /opt/img2img

FROM runtime AS full
COPY --from=full-build /opt/img2img /opt/img2img
