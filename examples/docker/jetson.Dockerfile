# Runs every command on a Jetson with JetPack 6.2. From the repository's root, on the Jetson:
#   docker build -f examples/docker/jetson.Dockerfile -t phreg-deploy .
#   docker run --rm --runtime nvidia phreg-deploy
# The image has CUDA 12.6 with NVRTC, and TensorRT 10.3.
FROM nvcr.io/nvidia/l4t-jetpack:r36.4.0

# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv python3-libnvinfer \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/phreg-deploy
COPY pyproject.toml README.md LICENSE ./
COPY phreg_deploy phreg_deploy
# The environment sees TensorRT's Python package, which is the system's.
RUN python3 -m venv --system-site-packages /opt/venv \
    && /opt/venv/bin/pip install --no-cache-dir ".[cuda]" "cuda-python<13"
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /data
ENTRYPOINT ["phreg-deploy"]
CMD ["doctor"]
