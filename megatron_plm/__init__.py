"""Megatron-PLM: pretrain, export and evaluate protein language models."""

__version__ = "0.1.0"
