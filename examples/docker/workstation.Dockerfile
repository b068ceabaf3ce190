# Runs every command on an NVIDIA GPU of a workstation or server (x86-64, driver of CUDA 13). From the repository's root:
#   docker build -f examples/docker/workstation.Dockerfile -t phreg-deploy .
#   docker run --rm --gpus all phreg-deploy
FROM nvidia/cuda:13.0.1-base-ubuntu24.04

# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/phreg-deploy
COPY pyproject.toml README.md LICENSE ./
COPY phreg_deploy phreg_deploy
# TensorRT and NVRTC come as wheels; the driver comes from the host.
RUN python3 -m venv /opt/venv && /opt/venv/bin/pip install --no-cache-dir ".[trt,gpu-images]"
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /data
ENTRYPOINT ["phreg-deploy"]
CMD ["doctor"]
