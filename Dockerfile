# One image for all roles; the role is the argument: api | gateway | worker.
#
#   docker build --target slim -t img2img-service:0.1.0-slim .   api and gateway, without torch
#   docker build -t img2img-service:0.1.0 .                      all three
#
# The image runs as a user without privileges on a read-only root file system; a worker needs a
# writable /tmp. torch's wheels contain CUDA, so the base is plain Python for any host with a
# driver. The role `local` does not run in containers, so its NATS and S3 servers are not installed.

ARG BASE_IMAGE=docker.io/library/python:3.11-slim-bookworm
# sha256:… pins the exact base image.
ARG BASE_DIGEST=

FROM ${BASE_IMAGE}${BASE_DIGEST:+@${BASE_DIGEST}} AS base


# This stage installs the packages. Only its /opt/img2img becomes part of an image.
FROM base AS slim-build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
RUN python3 -m venv /opt/pip \
 && python3 -m venv --without-pip /opt/img2img
WORKDIR /src
# Dependencies come first, because they change less often than the code. Only wheels are used, so nothing
# is compiled. The secret `pip` is a pip.conf for an index of your own.
COPY pyproject.toml constraints.txt ./
RUN python3 -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
e = p['optional-dependencies']; own = p['name']; \
write = lambda name, lines: open(name, 'w').write('\n'.join(x for x in lines if not x.startswith(own))); \
write('server.txt', p['dependencies'] + e['server']); write('worker.txt', e['worker'])"
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    /opt/pip/bin/pip --python /opt/img2img install --quiet --only-binary :all: \
    -c constraints.txt -r server.txt
COPY . .
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    /opt/pip/bin/pip --python /opt/img2img install --quiet --no-deps -c constraints.txt . \
 && /opt/img2img/bin/img2img-server --version

FROM slim-build AS full-build
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    /opt/pip/bin/pip --python /opt/img2img install --quiet --only-binary :all: \
    -c constraints.txt -r worker.txt


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
USER 65532:65532
EXPOSE 50051 8080 9090
STOPSIGNAL SIGTERM
ENTRYPOINT ["img2img-server"]

FROM runtime AS slim
COPY --from=slim-build /opt/img2img /opt/img2img

FROM runtime AS full
COPY --from=full-build /opt/img2img /opt/img2img
