# The image for a GPU cluster: the same package and the same Makefile as on a laptop, on NVIDIA's PyTorch image.
#   docker build --tag megatron-plm .
#   docker run --gpus all --shm-size 16g --volume /data:/data megatron-plm \
#     torchrun --nproc-per-node 8 launch/pretrain.sh --config launch/configs/esm2-35m.toml --data-path /data/sp --save /data/run
ARG BASE=nvcr.io/nvidia/pytorch:26.01-py3
FROM ${BASE}

WORKDIR /opt/megatron-plm
COPY pyproject.toml setup.py README.md LICENSE Makefile constraints.txt ./
COPY csrc csrc
COPY megatron_plm megatron_plm
COPY tape_finetune tape_finetune
COPY tools tools
COPY launch launch
COPY examples examples

# The image brings torch built for its CUDA: install into its own Python and keep that torch.
RUN python -m pip install --no-cache-dir --editable '.[all]'
RUN make --dry-run demo

CMD ["megatron-plm", "--help"]
