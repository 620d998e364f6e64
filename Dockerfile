# rats-video with the versions it was tested with, for a machine with NVIDIA GPUs.
#     docker build --tag rats-video .
#     docker run --rm --gpus all --shm-size 8g --volume "$PWD:/work" --user "$(id -u):$(id -g)" rats-video doctor
# Whatever follows the name is a command of rats-video. /work is where it starts; --volume cache:/cache keeps downloads.

# PyTorch's wheel brings the CUDA libraries; of the image only what finds the driver is needed.
FROM nvidia/cuda:13.0.2-base-ubuntu24.04

# A compiler and Python's headers: torch.compile builds a launcher for its kernels.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/rats-video \
    && useradd --uid 10001 --home-dir /cache --no-create-home rats \
    && mkdir --mode 1777 /cache /work

# USER and HOME for whoever --user names: PyTorch and the model hub write below them.
ENV PATH=/opt/rats-video/bin:$PATH USER=rats HOME=/cache PYTHONUNBUFFERED=1

# PyTorch alone first: gigabytes that need not be built again when the code changes.
WORKDIR /src
COPY constraints.txt ./
RUN pip install --no-cache-dir --constraint constraints.txt torch

COPY pyproject.toml README.md LICENSE ./
COPY rats_video rats_video
COPY cli cli
COPY configs configs
COPY datasets datasets
RUN pip install --no-cache-dir --constraint constraints.txt '.[demo,quant,trackers]' bitsandbytes

USER 10001
WORKDIR /work
ENTRYPOINT ["rats-video"]
CMD ["--help"]
