"""Every option of a training run, as frozen dataclasses: name, default, meaning.

The flag of a field is its name with hyphens (`seq_length` is `--seq-length`); its TOML key is the name, under the
table of its group (`[model]`, `[data]`, `[training]`). Names are Megatron's where Megatron has the option.
"""

import math
from dataclasses import dataclass, field, fields
from typing import Any, get_args, get_origin, get_type_hints

from megatron_plm.errors import UserError

NONE = "none"  # unsets an optional number, as a preset may have set it


def option(default: Any, help: str, *, choices: tuple[str, ...] | None = None) -> Any:
    """A dataclass field that also carries the text of its flag's help and its allowed values."""
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The shape of one model; the defaults are ESM-2's, docs/models.md says who else uses what."""

    tokenizer: str = option(
        "esm2", "vocabulary of the model and of its datasets: a name, or that of their sentencepiece model (FILE.model)"
    )
    num_layers: int = option(6, "number of Transformer blocks")
    hidden_size: int = option(320, "width of the residual stream")
    num_attention_heads: int = option(20, "attention heads of a block")
    ffn_hidden_size: int | None = option(None, "width inside the MLP (default: four times the hidden size)")
    norm_placement: str = option(
        "pre",
        "where a block normalizes: what goes into attention and MLP (pre), or the sum behind them (post)",
        choices=("pre", "post"),
    )
    normalization: str = option("LayerNorm", "kind of every norm", choices=("LayerNorm", "RMSNorm"))
    layernorm_epsilon: float = option(1e-5, "epsilon of every norm")
    position_embedding_type: str = option(
        "rope",
        "positions as rotations of queries and keys, or as vectors added to the tokens'",
        choices=("rope", "learned_absolute"),
    )
    max_position_embeddings: int | None = option(
        None, "how many learned positions there are; a row can have no more tokens"
    )
    activation: str = option(
        "gelu",
        "inside the MLP: GELU, exact or by tanh, or the gated SwiGLU",
        choices=("gelu", "gelu_tanh", "swiglu"),
    )
    add_bias_linear: bool = option(True, "biases in the linear maps of the blocks")
    embedding_layernorm: bool = option(False, "normalize what goes into the first block")
    head_transform: bool = option(True, "a linear map, GELU and a norm between the encoder and the output matrix")
    untie_embeddings_and_output_weights: bool = option(False, "an output matrix apart from the token embedding")
    hidden_dropout: float = option(0.0, "dropout of the embedding and of what each block adds")
    attention_dropout: float = option(
        0.0, "dropout of attention weights; slower on a GPU, as torch's packed attention lacks it"
    )
    objective: str = option(
        "mlm",
        "what is predicted: masked residues (mlm), or each next one from those before it (clm)",
        choices=("mlm", "clm"),
    )
    token_dropout: bool = option(
        True, "zero the embedding of <mask> and rescale the rest by the masked share of each protein (ESM-2)"
    )
    init_method_std: float = option(0.02, "standard deviation of the initial weights")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def ffn_size(self) -> int:
        return self.ffn_hidden_size or 4 * self.hidden_size


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """What is read, and how it becomes rows."""

    data_path: tuple[str, ...] | None = option(
        None,
        "prefix of the training dataset (PREFIX.bin, .idx, .json), or several with weights: 0.7 A 0.3 B",
    )
    valid_data_path: tuple[str, ...] | None = option(
        None, "prefixes of the validation datasets; without any nothing is evaluated"
    )
    seq_length: int = option(1024, "tokens of a row; several proteins are packed into one row")
    row_layout: str = option(
        "packed",
        "packed: several proteins fill a row, by best fit; padded: each has a row of its own, for comparisons",
        choices=("packed", "padded"),
    )
    packing_window: int = option(2048, "proteins that are packed together by best fit")
    long_sequences: str = option(
        "crop",
        "what becomes of a protein longer than a row: a random stretch, all stretches, none, or an error",
        choices=("crop", "chunk", "drop", "error"),
    )
    shuffle_block_size: int = option(0, "neighbours that an epoch's order keeps together; 0 mixes all sequences freely")
    shuffle_blocks_at_once: int = option(64, "blocks of neighbours that are read and mixed at a time")
    mask_prob: float = option(0.15, "share of the residues of each protein that are predicted")
    mask_selection: str = option(
        "exact",
        "how they are chosen: a fixed share of each protein, each residue by itself, or a fixed share in stretches",
        choices=("exact", "bernoulli", "spans"),
    )
    mask_span_length: float = option(3.0, "mean length of a stretch")
    mask_token_share: float = option(0.8, "of the chosen residues, the share that becomes <mask>")
    mask_random_share: float = option(0.1, "of the chosen residues, the share that becomes a random amino acid")
    num_workers: int = option(2, "threads that build batches ahead of the training loop; 0 builds them when needed")


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Batches, optimizer, schedule, evaluation and checkpoints."""

    micro_batch_size: int = option(4, "rows of one forward and backward pass of one process")
    global_batch_size: int = option(32, "rows of one optimizer step, over all processes")
    train_iters: int = option(1000, "optimizer steps of the whole run")
    lr: float = option(4e-4, "peak learning rate")
    min_lr: float = option(4e-5, "learning rate at the end of the decay")
    lr_warmup_iters: int = option(100, "steps of linear warm-up")
    lr_decay_style: str = option("linear", "shape of the decay", choices=("linear", "cosine", "constant"))
    weight_decay: float = option(0.01, "decoupled weight decay of matrices; biases and norms have none")
    adam_beta1: float = option(0.9, "first-moment decay of AdamW")
    adam_beta2: float = option(0.98, "second-moment decay of AdamW")
    adam_eps: float = option(1e-8, "epsilon of AdamW")
    clip_grad: float = option(1.0, "largest norm of the gradient; 0 turns clipping off")
    bf16: bool = option(False, "compute in bfloat16, with fp32 weights, gradients and optimizer state")
    recompute_granularity: str = option(
        "none",
        "recompute blocks in the backward pass: whole (full), or all but matrix products and attention (selective)",
        choices=("none", "selective", "full"),
    )
    compile: bool = option(False, "compile each block with torch.compile")
    fused_kernels: bool = option(
        False, "norms, dropout, activations and rotary positions of the blocks by fused ops (docs/kernels.md)"
    )
    norm_implementation: str = option(
        "torch", "whose norms compute, on a GPU (docs/kernels.md)", choices=("torch", "apex", "transformer_engine")
    )
    attention_implementation: str = option(
        "torch",
        "whose attention of all proteins at once computes, on a GPU; flash_attn_3 on Hopper (docs/kernels.md)",
        choices=("torch", "flash_attn", "flash_attn_3"),
    )
    optimizer_implementation: str = option("torch", "whose AdamW computes, on a GPU", choices=("torch", "apex"))
    distributed_timeout_minutes: float = option(
        10.0, "time after which a process that waits for another gives up, and the run ends"
    )
    seed: int = option(1234, "seed of the initial weights, the data order and the masks")
    log_interval: int = option(10, "steps between two lines of training metrics")
    eval_interval: int = option(100, "steps between two evaluations; the last step is always evaluated")
    eval_iters: int = option(10, "global batches of one evaluation, fewer if the validation set is smaller")
    save: str | None = option(None, "run directory: config, metrics, TensorBoard files and checkpoints")
    load: str | None = option(
        None, "run directory or checkpoint to go on from; equal to --save, a run without a checkpoint begins anew"
    )
    pretrained_checkpoint: str | None = option(
        None, "native checkpoint whose weights, by token, begin a new run; where --load goes on with one it is not read"
    )
    save_interval: int = option(500, "steps between two checkpoints; the last step is always saved")
    keep_last: int = option(3, "checkpoints to keep; older ones of this run are deleted")
    async_save: bool = option(
        False, "write checkpoints while training goes on, from a copy that is made in the host's memory first"
    )
    profile: bool = option(False, "trace some steps, and write the trace and a summary into the run directory")
    profile_step_start: int | None = option(
        None, "steps of the run before the traced ones (default: ten after this start, or what a short run allows)"
    )
    profile_step_end: int | None = option(
        None, "steps of the run up to the last traced one (default: two after the start of the trace)"
    )
    profile_ranks: str | None = option(
        None, "processes that trace, by rank with commas between, or all (default: the first)"
    )
    record_memory_history: bool = option(False, "with --profile: a snapshot of a GPU's memory, with its history, too")


@dataclass(frozen=True, kw_only=True)
class ParallelOptions:
    """How one model is laid out over the processes; what the others leave of them is data parallelism."""

    tensor_model_parallel_size: int = option(1, "processes that hold a share of each matrix and attention head")
    sequence_parallel: bool = option(
        False, "with tensor parallelism: between the matrices each process keeps a share of a row's tokens"
    )
    pipeline_model_parallel_size: int = option(1, "groups of processes that hold some of the blocks each")
    pipeline_schedule: str = option(
        "1f1b",
        "the order of forward and backward passes; interleaved and zbv give each process several stages",
        choices=("gpipe", "1f1b", "interleaved", "zbv"),
    )
    num_virtual_stages_per_pipeline_rank: int | None = option(
        None, "stages of one process (default: 2 where the schedule is interleaved or zbv, else 1)"
    )
    pipeline_layout: str | None = option(
        None, "blocks of each stage, as in 7,8,8,7 (default: evenly, embedding and head counted as a part of a block)"
    )
    context_parallel_size: int = option(1, "processes that hold a share of each row's tokens")
    data_parallel_sharding: str = option(
        "zero3",
        "what data-parallel processes share: nothing, gradients and optimizer state (zero2), or weights too (zero3)",
        choices=("none", "zero2", "zero3"),
    )
    data_parallel_replicate_size: int = option(
        1, "whole copies kept of what is shared out (HSDP); with one a node, gathering stays inside nodes"
    )

    @property
    def num_virtual_stages(self) -> int:
        """Stages of one process."""
        if self.num_virtual_stages_per_pipeline_rank is not None:
            return self.num_virtual_stages_per_pipeline_rank
        return 2 if self.pipeline_schedule in ("interleaved", "zbv") else 1

    @property
    def num_stages(self) -> int:
        """Stages of the pipeline."""
        return self.pipeline_model_parallel_size * self.num_virtual_stages


@dataclass(frozen=True, kw_only=True)
class Config:
    """One resolved run."""

    preset: str | None = None
    model: ModelOptions = ModelOptions()
    data: DataOptions = DataOptions()
    training: TrainingOptions = TrainingOptions()
    parallel: ParallelOptions = ParallelOptions()


GROUPS: dict[str, type] = {
    "model": ModelOptions,
    "data": DataOptions,
    "training": TrainingOptions,
    "parallel": ParallelOptions,
}


@dataclass(frozen=True)
class OptionField:
    """One option as the loaders see it."""

    group: str
    name: str
    type: type  # bool, int, float, str, or tuple (of str)
    optional: bool  # None is allowed
    default: Any
    help: str
    choices: tuple[str, ...] | None

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    def check(self, value: Any, place: str) -> Any:
        """Return `value` in the option's type, or raise UserError naming `place`."""
        if self.optional and (value is None or (self.type is int and value == NONE)):
            return None
        if self.type is tuple:
            words = [value] if isinstance(value, str) else value
            if not isinstance(words, list) or not all(isinstance(word, str | int | float) for word in words):
                raise UserError(
                    f"{place}: {self.name} must be a string or a list of strings and numbers, not {value!r}"
                )
            return tuple(str(word) for word in words)
        if self.type is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, self.type) or (self.type is int and isinstance(value, bool)):
            raise UserError(f"{place}: {self.name} must be {self.type.__name__}, not {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{place}: {self.name} must be a finite number, not {value!r}")
        if self.choices and value not in self.choices:
            raise UserError(f"{place}: {self.name} must be one of {', '.join(self.choices)}, not {value!r}")
        return value


def option_fields() -> dict[str, OptionField]:
    """All options by name; names are unique across groups."""
    found: dict[str, OptionField] = {}
    for group, options in GROUPS.items():
        hints = get_type_hints(options)
        for entry in fields(options):
            members = get_args(hints[entry.name]) or (hints[entry.name],)
            assert entry.name not in found, f"two options are named {entry.name}"
            found[entry.name] = OptionField(
                group=group,
                name=entry.name,
                type=get_origin(members[0]) or members[0],
                optional=type(None) in members,
                default=entry.default,
                help=entry.metadata["help"],
                choices=entry.metadata["choices"],
            )
    return found
