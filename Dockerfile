# syntax=docker/dockerfile:1
# Two targets, one service:
#   docker build --target cpu -t hyper:cpu .        docker build --target gpu -t hyper:gpu .
# docs/deploy.md has the command that runs it; deploy/compose.yaml adds Prometheus and Grafana. The container needs no
# capability and no set-uid program. It writes only to /tmp, /var/cache/hyper and /var/lib/hyper.

# The newest 3.11 image at the time of writing; --build-arg PYTHON_IMAGE=python@sha256:... pins your verified digest.
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm

FROM ${PYTHON_IMAGE} AS base
# Debian's archive drops a package's old versions at each point release: a pin here would break the build, not fix it.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends tini libnuma1 \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/apt /var/log/dpkg.log
WORKDIR /opt/hyper

FROM scratch AS source
COPY pyproject.toml README.md LICENSE /
COPY hyper_model /hyper_model
COPY client /client
COPY server /server
COPY training /training
COPY loadtests /loadtests

# The locked packages come first, because their layer changes only with a lock file.
FROM base AS build-cpu
ENV PIP_NO_CACHE_DIR=1
COPY requirements requirements
RUN SKIP_PROJECT=1 requirements/install.sh /opt/venv cpu
COPY --from=source / ./
RUN /opt/venv/bin/python -m pip install --quiet --no-deps --no-build-isolation . \
    && /opt/venv/bin/python -m pip uninstall --quiet --yes pip

FROM base AS build-gpu
ENV PIP_NO_CACHE_DIR=1
COPY requirements requirements
# No import check: vLLM's CUDA build needs the driver, and build machines may not have it.
RUN SKIP_PROJECT=1 SKIP_CHECK=1 requirements/install.sh /opt/venv gpu
COPY --from=source / ./
RUN /opt/venv/bin/python -m pip install --quiet --no-deps --no-build-isolation . \
    && /opt/venv/bin/python -m pip uninstall --quiet --yes pip

# The bill-of-materials tool has its own environment, outside the image's contents.
FROM base AS sbom-tool
ENV PIP_NO_CACHE_DIR=1
COPY requirements requirements
RUN SKIP_PROJECT=1 requirements/install.sh /opt/sbom sbom

FROM base AS runtime
# Remove installers and set-uid bits. Container runtimes give a tmpfs the mode of the covered folder, owned by root. The
# mode of /tmp lets the service's user write there in every runtime.
RUN rm -rf /usr/local/lib/python3*/site-packages/pip* /usr/local/lib/python3*/site-packages/setuptools* \
        /usr/local/lib/python3*/site-packages/wheel* /usr/local/lib/python3*/ensurepip /usr/local/bin/pip* \
        /usr/local/bin/wheel \
    && find / -xdev -type f -perm /6000 -exec chmod a-s {} + \
    && groupadd --gid 10001 hyper \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /var/cache/hyper --shell /usr/sbin/nologin hyper \
    && install --directory --owner 10001 --group 10001 --mode 1777 /var/cache/hyper \
    && install --directory --owner 10001 --group 10001 --mode 0700 /var/lib/hyper
COPY checkpoints checkpoints
# --build-arg REVISION=$(git rev-parse HEAD) records the source commit.
ARG REVISION=unknown
LABEL org.opencontainers.image.title="HyPeR" \
    org.opencontainers.image.description="Answers questions about audio clips with a perception trace and its reasoning." \
    org.opencontainers.image.version="0.1.0" \
    org.opencontainers.image.revision="${REVISION}" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.base.name="docker.io/library/python:3.11.14-slim-bookworm"
# The cache has its own volume: torch and Triton load compiled code from it, and /tmp may be noexec.
ENV PATH=/opt/venv/bin:$PATH \
    HOME=/var/cache/hyper \
    XDG_CACHE_HOME=/var/cache/hyper \
    VLLM_CACHE_ROOT=/var/cache/hyper/vllm \
    TRITON_CACHE_DIR=/var/cache/hyper/triton \
    TORCHINDUCTOR_CACHE_DIR=/var/cache/hyper/inductor \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HF_HUB_OFFLINE=1 \
    HYPER_HOST=0.0.0.0 \
    HYPER_PORT=8000 \
    HYPER_STATE_DIR=/var/lib/hyper \
    HYPER_CHECKPOINT=/opt/hyper/checkpoints/hyper-mini
VOLUME /var/cache/hyper
# Stored files; they outlive the container.
VOLUME /var/lib/hyper
EXPOSE 8000
USER 10001:10001
STOPSIGNAL SIGTERM
# /livez instead of /readyz: orchestrators replace unhealthy containers, but a full service or a restarting engine must not
# be replaced. Load balancers use /readyz.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-S", "-c", \
         "import os, urllib.request; urllib.request.urlopen(f'http://127.0.0.1:{os.environ[\"HYPER_PORT\"]}/livez', timeout=4)"]
# tini forwards signals, reaps orphaned engine processes, and exits with the service's exit code.
ENTRYPOINT ["tini", "--"]
CMD ["hyper", "serve"]

FROM runtime AS whole-cpu
# With HYPER_COMPILE=auto, torch compiles the model for the processor at hand, at the first start.
USER 0:0
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libc6-dev \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/apt /var/log/dpkg.log
USER 10001:10001
COPY --from=build-cpu /opt/venv /opt/venv

FROM runtime AS whole-gpu
# Triton compiles its launcher with a C compiler at the engine's start.
USER 0:0
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/apt /var/log/dpkg.log
USER 10001:10001
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=build-gpu /opt/venv /opt/venv

FROM whole-cpu AS sbom-cpu
COPY --from=sbom-tool /opt/sbom /opt/sbom
COPY pyproject.toml requirements/sbom.py ./
RUN /opt/sbom/bin/python sbom.py /tmp/sbom.cdx.json --python /opt/venv/bin/python --debian

FROM whole-gpu AS sbom-gpu
COPY --from=sbom-tool /opt/sbom /opt/sbom
COPY pyproject.toml requirements/sbom.py ./
RUN /opt/sbom/bin/python sbom.py /tmp/sbom.cdx.json --python /opt/venv/bin/python --debian

# docker run --rm --entrypoint cat hyper:cpu /opt/hyper/sbom.cdx.json
FROM whole-cpu AS cpu
COPY --from=sbom-cpu /tmp/sbom.cdx.json ./

FROM whole-gpu AS gpu
COPY --from=sbom-gpu /tmp/sbom.cdx.json ./
