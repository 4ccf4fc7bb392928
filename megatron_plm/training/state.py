"""Everything one training run consists of, and how it is built from a configuration."""

from dataclasses import dataclass, field

import torch

from megatron_plm.config.options import Config
from megatron_plm.data.indexed import IndexedDataset
from megatron_plm.data.loader import Loader
from megatron_plm.data.packing import Cursor
from megatron_plm.errors import UserError
from megatron_plm.model.initialize import initialize
from megatron_plm.model.transformer import MaskedLanguageModel
from megatron_plm.parallel.apply import parallelize
from megatron_plm.parallel.mesh import World
from megatron_plm.tokenizers import Tokenizer, get_tokenizer
from megatron_plm.training.optimizer import build_optimizer


@dataclass(frozen=True)
class Datasets:
    """The opened datasets of a run and the vocabulary they share with the model."""

    tokenizer: Tokenizer
    train: IndexedDataset
    valid: IndexedDataset | None


@dataclass
class Progress:
    """How far the run is; with the weights and the optimizer state all that a resumed run needs."""

    step: int = 0
    consumed_tokens: int = 0
    cursor: Cursor = field(default_factory=Cursor)


@dataclass
class Run:
    """One training run, ready to train."""

    config: Config
    world: World
    datasets: Datasets
    model: MaskedLanguageModel
    optimizer: torch.optim.AdamW
    train_loader: Loader
    valid_loader: Loader | None
    progress: Progress


def open_datasets(config: Config) -> Datasets:
    """Open the datasets and check them against the model's tokenizer; raises UserError."""
    tokenizer = get_tokenizer(config.model.tokenizer)
    if config.data.data_path is None:
        raise UserError("--data-path is missing: give the prefix that tools/preprocess_data.py wrote")

    def opened(prefix: str, flag: str) -> IndexedDataset:
        dataset = IndexedDataset(prefix)
        made_with = dataset.metadata.get("tokenizer")
        if made_with is None:
            raise UserError(
                f"{flag} {prefix}: {prefix}.json is missing, which says what tokenizer the dataset was made with; "
                "make the dataset with tools/preprocess_data.py"
            )
        if made_with["sha256"] != tokenizer.sha256:
            raise UserError(
                f"{flag} {prefix}: the dataset was made with tokenizer {made_with['name']!r} and the model has "
                f"{tokenizer.name!r}; preprocess the FASTA file again with --tokenizer {tokenizer.name}"
            )
        return dataset

    train = opened(config.data.data_path, "--data-path")
    valid_path = config.data.valid_data_path
    return Datasets(tokenizer, train, opened(valid_path, "--valid-data-path") if valid_path else None)


def build_run(config: Config, world: World, datasets: Datasets) -> Run:
    """Build the run at its first step."""
    training = config.training
    model = MaskedLanguageModel(config.model, datasets.tokenizer)
    initialize(model, config.model, training.seed)
    model.to(world.device)
    parallelize(model, world, bf16=training.bf16, recompute=training.recompute_granularity == "full")
    optimizer = build_optimizer(
        model,
        lr=training.lr,
        weight_decay=training.weight_decay,
        betas=(training.adam_beta1, training.adam_beta2),
        eps=training.adam_eps,
    )
    return Run(
        config=config,
        world=world,
        datasets=datasets,
        model=model,
        optimizer=optimizer,
        train_loader=_build_loader(config, world, datasets.train, datasets.tokenizer, "train"),
        valid_loader=_build_loader(config, world, datasets.valid, datasets.tokenizer, "valid")
        if datasets.valid
        else None,
        progress=Progress(),
    )


def _build_loader(
    config: Config, world: World, dataset: IndexedDataset, tokenizer: Tokenizer, dataset_id: str
) -> Loader:
    return Loader(
        dataset,
        config.data,
        tokenizer,
        micro_batch_size=config.training.micro_batch_size,
        global_batch_size=config.training.global_batch_size,
        seed=config.training.seed,
        dataset_id=dataset_id,
        rank=world.rank,
        world_size=world.size,
    )
