# For the CPU:   docker build -t usfmae_jax .
# NVIDIA GPUs:   docker build -t usfmae_jax --build-arg EXTRAS=prep,cuda .
# Cloud TPU:     docker build -t usfmae_jax --build-arg EXTRAS=prep,tpu .
FROM python:3.12-slim
ARG EXTRAS=prep
ENV PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
COPY pyproject.toml requirements.txt README.md LICENSE ./
COPY configs configs
COPY data_prep data_prep
COPY usfmae_jax usfmae_jax
RUN pip install ".[${EXTRAS}]"
# What is kept for later runs, such as features and the secret of private builds, stays in the folder that is mounted.
ENV HOME=/work
WORKDIR /work
CMD ["usfmae-pretrain", "--help"]
