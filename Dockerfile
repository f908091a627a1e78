# The environment of env_setup.sh on CUDA 13, for NVIDIA GPUs: docs/flux_1.md, "In a container".
#   docker build -t hier-grpo .
#   docker run --rm --gpus all --shm-size 16g -v hub:/hub -v "$PWD/data:/app/data" -v "$PWD/outputs:/app/outputs" \
#     -v "$PWD/image_reward_ckpt:/app/image_reward_ckpt" -v "$PWD/hps_ckpt:/app/hps_ckpt" \
#     hier-grpo bash scripts/finetune/finetune_flux_grpo_MixGRPO.sh --dry_run
# The driver must know CUDA 13 (580 or newer). The compiler and the headers are for torch.compile and DeepSpeed.
FROM nvidia/cuda:13.0.2-devel-ubuntu24.04

RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
      g++ git ninja-build openssh-client pdsh python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 trainer \
    && mkdir -p /app/data /app/outputs /app/image_reward_ckpt /app/hps_ckpt /hub \
    && chown -R trainer /app /hub

USER trainer
WORKDIR /app

# First what the environment depends on, so that a change of the code does not install it again. Another build of torch:
# --build-arg TORCH_INDEX_URL=...
ARG TORCH_INDEX_URL=
COPY --chown=trainer requirements.txt pyproject.toml env_setup.sh README.md ./
COPY --chown=trainer fastvideo/__init__.py fastvideo/__main__.py fastvideo/
RUN bash env_setup.sh && rm -rf ~/.cache/pip

COPY --chown=trainer . .

# Keys come from the environment of `docker run` (-e HF_TOKEN -e WANDB_API_KEY), never from the image.
ENV HF_HOME=/hub PYTHON_BIN=/app/.venv/bin/python PATH=/app/.venv/bin:$PATH
VOLUME ["/hub", "/app/data", "/app/outputs", "/app/image_reward_ckpt", "/app/hps_ckpt"]
CMD ["hier-grpo", "train", "--help"]
