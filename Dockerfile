# syntax=docker/dockerfile:1
# CPU by default. For a GPU give a CUDA runtime image and the matching extra:
#   docker build --build-arg RUNTIME=nvidia/cuda:13.0.1-cudnn-runtime-ubuntu24.04 --build-arg EXTRA=onnx-gpu .
ARG RUNTIME=ubuntu:24.04

FROM ${RUNTIME} AS build
ARG EXTRA=onnx
ENV DEBIAN_FRONTEND=noninteractive
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev libnghttp2-dev libssl-dev pkg-config python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY pyproject.toml setup.py README.md LICENSE ./
COPY aiorch_server aiorch_server
COPY backends backends
COPY clients clients
COPY proto proto
RUN python3 -m venv /opt/aiorch && /opt/aiorch/bin/pip install --no-cache-dir ".[${EXTRA}]"

FROM ${RUNTIME}
ENV DEBIAN_FRONTEND=noninteractive
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends libnghttp2-14 python3 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --system --create-home --uid 10001 aiorch \
    && install -d -o aiorch /models
COPY --from=build /opt/aiorch /opt/aiorch
ENV PATH=/opt/aiorch/bin:$PATH PYTHONUNBUFFERED=1
USER 10001
WORKDIR /home/aiorch
VOLUME /models
EXPOSE 8000 8001 8002
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s CMD ["aiorch", "status", "--ready"]
# Inside a container loopback would reach nobody: publish the ports where they should be seen. --insecure, because there
# are no certificates and callers yet: whoever reaches a published port may do everything. docs/security.md has the rest.
ENTRYPOINT ["aiorch", "serve", "--insecure", "--grpc-address", "0.0.0.0", "--http-address", "0.0.0.0", "--metrics-address", "0.0.0.0"]
CMD ["--model-repository", "/models"]
