# syntax=docker/dockerfile:1
# Two targets, one service:
#   docker build --target cpu -t hyper:cpu .        docker build --target gpu -t hyper:gpu .
#   docker run --rm -p 127.0.0.1:8000:8000 --read-only --tmpfs /tmp:size=512m,noexec,nosuid,nodev,mode=1777 \
#       -v hyper-cache:/var/cache/hyper --cap-drop ALL --security-opt no-new-privileges -e HYPER_OPEN_TO_ALL=true hyper:cpu
# For others than this machine: -p 8000:8000 -v ./keys.json:/keys.json:ro -e HYPER_KEY_FILE=/keys.json (docs/operations.md).
# The GPU image needs the NVIDIA container runtime (--gpus all); its CUDA libraries come from the hash-locked wheels.

ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS base
# Debian's archive drops a package's old versions at each point release: a pin here would break the build, not fix it.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends tini libnuma1 \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/hyper

FROM scratch AS source
COPY pyproject.toml README.md LICENSE /
COPY hyper_model /hyper_model
COPY server /server
COPY training /training
COPY loadtests /loadtests

# The locked packages come first: their layer changes only when a lock file does.
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
# No import check here: vLLM's CUDA build asks for the driver, which a build machine need not have.
RUN SKIP_PROJECT=1 SKIP_CHECK=1 requirements/install.sh /opt/venv gpu
COPY --from=source / ./
RUN /opt/venv/bin/python -m pip install --quiet --no-deps --no-build-isolation . \
    && /opt/venv/bin/python -m pip uninstall --quiet --yes pip

FROM base AS runtime
RUN rm -rf /usr/local/lib/python3.11/site-packages/pip* /usr/local/bin/pip* \
    && groupadd --gid 10001 hyper \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /var/cache/hyper --shell /usr/sbin/nologin hyper \
    && install --directory --owner 10001 --group 10001 /var/cache/hyper
COPY checkpoints checkpoints
# The cache is a volume of its own: Triton loads code that it writes there, which a noexec /tmp forbids.
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
    HYPER_CHECKPOINT=/opt/hyper/checkpoints/hyper-mini
VOLUME /var/cache/hyper
EXPOSE 8000
USER 10001:10001
STOPSIGNAL SIGTERM
# The start period covers loading and warming up the engine on two busy cores.
HEALTHCHECK --interval=10s --timeout=5s --start-period=300s --retries=3 \
    CMD ["python", "-c", \
         "import os, urllib.request; urllib.request.urlopen(f'http://127.0.0.1:{os.environ[\"HYPER_PORT\"]}/readyz', timeout=4)"]
ENTRYPOINT ["tini", "--"]
CMD ["hyper", "serve"]

FROM runtime AS cpu
COPY --from=build-cpu /opt/venv /opt/venv

FROM runtime AS gpu
# Triton compiles its launcher with the C compiler it finds when the engine starts: this target alone cannot go without.
USER 0:0
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
USER 10001:10001
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=build-gpu /opt/venv /opt/venv
