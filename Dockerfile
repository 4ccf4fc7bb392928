# The image for a GPU cluster: the package on top of an image that brings torch with CUDA, installed as on a laptop.
#   docker build --tag megatron-plm .
#   docker run --gpus all --shm-size 16g --volume /data:/data megatron-plm \
#     torchrun --nproc-per-node 8 launch/pretrain.sh --config launch/configs/esm2-35m.toml --data-path /data/sp --save /data/run
#
# The base needs Python 3.11 or later and a release of torch 2.11 or later built with CUDA. Many of NVIDIA's own images
# (nvcr.io/nvidia/pytorch) carry an alpha such as 2.10.0a0, which is too old: take one whose torch says 2.11 or later.
ARG BASE_IMAGE=pytorch/pytorch:2.11.0-cuda12.8-cudnn9-devel
FROM ${BASE_IMAGE}

RUN apt-get update && apt-get install --yes --no-install-recommends g++ make python3-dev && rm -rf /var/lib/apt/lists/*

# The image's own Python is the one to install into; the Makefile and launch/pretrain.sh read PYTHON.
ENV PYTHON=python3 PIP_BREAK_SYSTEM_PACKAGES=1 PIP_NO_CACHE_DIR=1

WORKDIR /opt/megatron-plm
COPY pyproject.toml setup.py README.md LICENSE Makefile constraints.txt ./
COPY csrc csrc
COPY megatron_plm megatron_plm
COPY tape_finetune tape_finetune
COPY tools tools
COPY launch launch
COPY examples examples

# Keeps the image's torch: its version is a constraint, in place of those that the base may have set for pip.
RUN make install

# check: torch is still the CUDA build, and the package is there with its extensions
RUN python3 -c "import torch, megatron_plm.data._native, megatron_plm.kernels._cpu; assert torch.version.cuda, torch.__version__"

CMD ["megatron-plm", "--help"]
