"""Everything one training run consists of, and how it is built from a configuration."""

from dataclasses import dataclass

import torch

from megatron_plm.config.options import Config
from megatron_plm.data.blend import Cursor
from megatron_plm.data.loader import Loader
from megatron_plm.data.mixture import Mixture, check_same_run, model_tokenizer, open_mixture
from megatron_plm.errors import UserError
from megatron_plm.model.initialize import initialize
from megatron_plm.parallel.apply import Fill, ParallelModel, build_model
from megatron_plm.parallel.mesh import World
from megatron_plm.tokenizers import Tokenizer
from megatron_plm.training.optimizer import build_optimizer


@dataclass(frozen=True)
class Datasets:
    """The opened datasets of a run and the vocabulary they share with the model."""

    tokenizer: Tokenizer
    train: Mixture
    valid: Mixture | None


@dataclass
class Progress:
    """How far the run is; with the weights and the optimizer state all that a resumed run needs."""

    cursor: Cursor
    step: int = 0
    consumed_tokens: int = 0


@dataclass
class Run:
    """One training run, ready to train."""

    config: Config
    world: World
    datasets: Datasets
    model: ParallelModel
    optimizer: torch.optim.Optimizer
    train_loader: Loader
    valid_loader: Loader | None
    progress: Progress


def open_datasets(config: Config) -> Datasets:
    """Open the datasets and check them against the model's tokenizer; raises UserError."""
    if not config.data.data_path:
        raise UserError("--data-path is missing: give the prefix that tools/preprocess_data.py wrote")
    tokenizer = model_tokenizer(config.model.tokenizer, config.data.data_path, flag="--data-path")
    train = open_mixture(config.data.data_path, tokenizer, flag="--data-path")
    valid_path = config.data.valid_data_path
    valid = open_mixture(valid_path, tokenizer, flag="--valid-data-path") if valid_path else None
    if valid is not None:
        check_same_run(train, valid)
    return Datasets(tokenizer, train, valid)


def build_run(config: Config, world: World, datasets: Datasets, *, fill: Fill = initialize) -> Run:
    """Build the run at its first step, its weights by `fill`."""
    training = config.training
    model = build_model(config, datasets.tokenizer, world, fill=fill)
    optimizer = build_optimizer(
        model.parameters,
        lr=training.lr,
        weight_decay=training.weight_decay,
        betas=(training.adam_beta1, training.adam_beta2),
        eps=training.adam_eps,
        implementation=training.optimizer_implementation,
    )
    train_loader = _build_loader(config, world, datasets.train, datasets.tokenizer, "train")
    valid = datasets.valid
    return Run(
        config=config,
        world=world,
        datasets=datasets,
        model=model,
        optimizer=optimizer,
        train_loader=train_loader,
        valid_loader=_build_loader(config, world, valid, datasets.tokenizer, "valid") if valid else None,
        progress=Progress(cursor=train_loader.start()),
    )


def _build_loader(config: Config, world: World, mixture: Mixture, tokenizer: Tokenizer, name: str) -> Loader:
    return Loader(
        mixture.datasets,
        mixture.weights,
        config.data,
        tokenizer,
        objective=config.model.objective,
        micro_batch_size=config.training.micro_batch_size,
        global_batch_size=config.training.global_batch_size,
        seed=config.training.seed,
        name=name,
        rank=world.dp_rank,
        world_size=world.layout.dp,
        pin_memory=world.device.type == "cuda",
    )
