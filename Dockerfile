# syntax=docker/dockerfile:1
# Two targets, one service:
#   docker build --target cpu -t hyper:cpu .        docker build --target gpu -t hyper:gpu .
# docs/deploy.md has the line that runs it, and deploy/compose.yaml the service with what watches it. It needs no
# capability, no set-uid program, and of the file system only /tmp and /var/cache/hyper to write to.

# The newest of its line when it was chosen; --build-arg PYTHON_IMAGE=python@sha256:... pins what you have checked.
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

# What lists the image's contents, apart from them.
FROM base AS sbom-tool
ENV PIP_NO_CACHE_DIR=1
COPY requirements requirements
RUN SKIP_PROJECT=1 requirements/install.sh /opt/sbom sbom

FROM base AS runtime
# Neither an installer nor a set-uid program is left. Runtimes give a tmpfs the mode of the folder that it covers, and to
# root: a mode like that of /tmp lets the one user write there in all of them.
RUN rm -rf /usr/local/lib/python3*/site-packages/pip* /usr/local/lib/python3*/site-packages/setuptools* \
        /usr/local/lib/python3*/site-packages/wheel* /usr/local/lib/python3*/ensurepip /usr/local/bin/pip* \
        /usr/local/bin/wheel \
    && find / -xdev -type f -perm /6000 -exec chmod a-s {} + \
    && groupadd --gid 10001 hyper \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /var/cache/hyper --shell /usr/sbin/nologin hyper \
    && install --directory --owner 10001 --group 10001 --mode 1777 /var/cache/hyper
COPY checkpoints checkpoints
# --build-arg REVISION=$(git rev-parse HEAD) says what it was built from.
ARG REVISION=unknown
LABEL org.opencontainers.image.title="HyPeR" \
    org.opencontainers.image.description="Answers questions about audio clips, with what was heard and how it was reasoned." \
    org.opencontainers.image.version="0.1.0" \
    org.opencontainers.image.revision="${REVISION}" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.base.name="docker.io/library/python:3.11.14-slim-bookworm"
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
# Alive, not ready: an unhealthy container is replaced by whoever runs it, and one that is full, or whose engine is being
# started again, must not be. Who sends requests here asks /readyz.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-S", "-c", \
         "import os, urllib.request; urllib.request.urlopen(f'http://127.0.0.1:{os.environ[\"HYPER_PORT\"]}/livez', timeout=4)"]
# tini passes signals on, reaps what the engine leaves behind, and ends with the service's exit code.
ENTRYPOINT ["tini", "--"]
CMD ["hyper", "serve"]

FROM runtime AS whole-cpu
COPY --from=build-cpu /opt/venv /opt/venv

FROM runtime AS whole-gpu
# Triton compiles its launcher with the C compiler it finds when the engine starts: this target alone cannot go without.
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
