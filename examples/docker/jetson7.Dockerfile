# Runs every command on a Jetson with JetPack 7, such as Thor. From the repository's root, on the Jetson:
#   docker build -f examples/docker/jetson7.Dockerfile -t phreg-deploy .
#   docker run --rm --runtime nvidia phreg-deploy
# Since JetPack 7 a Jetson runs NVIDIA's images for ARM servers. This one has CUDA 13.0 with NVRTC, and TensorRT 10.13.
FROM nvcr.io/nvidia/tensorrt:25.09-py3

# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/phreg-deploy
COPY pyproject.toml README.md LICENSE ./
COPY phreg_deploy phreg_deploy
# The environment sees TensorRT's Python package, which is the system's.
RUN python3 -m venv --system-site-packages /opt/venv && /opt/venv/bin/pip install --no-cache-dir ".[cuda]"
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /data
ENTRYPOINT ["phreg-deploy"]
CMD ["doctor"]
