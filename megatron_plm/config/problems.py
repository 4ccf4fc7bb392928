"""Everything about a configuration that cannot work, found before anything is built; nothing is repaired."""

import math

from megatron_plm.config.layout import layout_problems
from megatron_plm.config.options import Config, DataOptions, ModelOptions, TrainingOptions

ALL_RANKS = "all"  # of --profile-ranks
_WIDEST_FUSED_NORM = 8192  # kMaxWidth in csrc/kernels/norm.cu
_LARGEST_DISTANCE = 4096  # of the head counts that are proposed from the one that was asked for


def problems(config: Config, *, world_size: int = 1) -> list[str]:
    """Everything about `config` that cannot work on `world_size` processes, one sentence each; nothing is repaired."""
    model, data, training = config.model, config.data, config.training
    found = []

    def require(holds: bool, sentence: str) -> None:
        if not holds:
            found.append(sentence)

    positive = {
        **{n: getattr(model, n) for n in ("num_layers", "hidden_size", "num_attention_heads", "init_method_std")},
        **{n: getattr(data, n) for n in ("packing_window", "shuffle_blocks_at_once")},
        **{n: getattr(training, n) for n in ("micro_batch_size", "global_batch_size", "train_iters", "lr")},
        **{n: getattr(training, n) for n in ("log_interval", "eval_interval", "eval_iters", "save_interval")},
        "keep_last": training.keep_last,
        "distributed_timeout_minutes": training.distributed_timeout_minutes,
        "adam_eps": training.adam_eps,
        "layernorm_epsilon": model.layernorm_epsilon,
    }
    for name, value in positive.items():
        require(value > 0, f"--{name.replace('_', '-')} must be above 0, not {value}")
        require(value != math.inf, f"--{name.replace('_', '-')} must be finite, not {value}")
    not_negative = {n: getattr(training, n) for n in ("weight_decay", "clip_grad", "min_lr", "lr_warmup_iters")}
    not_negative |= {n: getattr(data, n) for n in ("shuffle_block_size", "num_workers")}
    for name, value in not_negative.items():
        require(value >= 0, f"--{name.replace('_', '-')} must not be negative, not {value}")
    for name in ("adam_beta1", "adam_beta2"):
        value = getattr(training, name)
        require(0 <= value < 1, f"--{name.replace('_', '-')} must lie in [0, 1), not {value}")
    require(
        model.ffn_hidden_size is None or model.ffn_hidden_size > 0,
        f"--ffn-hidden-size must be above 0, not {model.ffn_hidden_size}",
    )
    for name in ("hidden_dropout", "attention_dropout"):
        value = getattr(model, name)
        require(0 <= value < 1, f"--{name.replace('_', '-')} must lie in [0, 1), not {value}")
    found += _position_problems(model, data)
    require(0 < data.mask_prob < 1, f"--mask-prob must lie between 0 and 1, not {data.mask_prob}")
    require(data.mask_span_length >= 1, f"--mask-span-length must be at least 1, not {data.mask_span_length}")
    shares = (data.mask_token_share, data.mask_random_share)
    require(
        min(shares) >= 0 and sum(shares) <= 1,
        f"--mask-token-share {shares[0]} and --mask-random-share {shares[1]} must be 0 or more, and 1 at most in sum",
    )
    require(data.seq_length >= 16, f"--seq-length must be at least 16, not {data.seq_length}")
    if model.num_attention_heads > 0 and model.hidden_size > 0:
        divides = model.hidden_size % model.num_attention_heads == 0
        require(
            divides,
            f"--hidden-size {model.hidden_size} is not divisible by --num-attention-heads "
            f"{model.num_attention_heads}; {_divisors_text(model)}",
        )
        require(
            not divides or model.head_dim % 2 == 0 or model.position_embedding_type != "rope",
            f"--hidden-size {model.hidden_size} over --num-attention-heads {model.num_attention_heads} gives an odd "
            f"head size of {model.head_dim}, and rotary positions rotate pairs; choose an even head size",
        )
    require(
        training.min_lr <= training.lr,
        f"--min-lr {training.min_lr} is above --lr {training.lr}; lower --min-lr",
    )
    found += _profile_problems(config.training, world_size) + _kernel_problems(config)
    return found or layout_problems(config, world_size)


def _profile_problems(training: TrainingOptions, world_size: int) -> list[str]:
    start, end, ranks = training.profile_step_start, training.profile_step_end, training.profile_ranks
    if not training.profile:
        given = {"profile-step-start": start, "profile-step-end": end, "profile-ranks": ranks}
        flags = [f"--{name}" for name, value in given.items() if value is not None]
        flags += ["--record-memory-history"] if training.record_memory_history else []
        return [f"{', '.join(flags)}: nothing is traced without --profile; give that too"] if flags else []
    found = []
    if training.save is None:
        found.append("--profile writes into the run directory, and there is none: give --save too")
    if start is not None and end is not None and end <= start:
        found.append(f"--profile-step-end {end} must be above --profile-step-start {start}")
    if ranks not in (None, ALL_RANKS):
        words = (ranks or "").split(",")
        if not all(word.isdecimal() and str(int(word)) == word and int(word) < world_size for word in words):
            found.append(
                f"--profile-ranks {ranks}: expected numbers below {world_size}, the number of processes, with commas "
                f"between, or {ALL_RANKS}"
            )
    return found


def _kernel_problems(config: Config) -> list[str]:
    """What keeps the kernels of this package, or of others, from computing what they were chosen for."""
    training, found = config.training, []
    if training.fused_kernels and config.model.hidden_size > _WIDEST_FUSED_NORM:
        found.append(
            f"--fused-kernels: its norms take at most {_WIDEST_FUSED_NORM:,} features, and --hidden-size is "
            f"{config.model.hidden_size:,}; leave the flag out"
        )
    if training.norm_implementation != "torch":
        others = {
            "--fused-kernels has norms of its own": training.fused_kernels,
            "--compile makes the norms of the blocks itself": training.compile,
            "--sequence-parallel gives norms tensors that only torch's know": config.parallel.sequence_parallel,
        }
        chosen = f"--norm-implementation {training.norm_implementation}"
        found += [f"{chosen}: {why}; leave out one of the two" for why, is_on in others.items() if is_on]
    if training.attention_implementation != "torch" and not training.bf16:
        found.append(
            f"--attention-implementation {training.attention_implementation} takes 16-bit numbers only: add --bf16, "
            "or leave it out"
        )
    if training.attention_implementation == "flash_attn_3" and config.model.attention_dropout > 0:
        found.append(
            "--attention-implementation flash_attn_3: its kernels have no dropout, and --attention-dropout is "
            f"{config.model.attention_dropout:g}; leave out one of the two"
        )
    return found


def _position_problems(model: ModelOptions, data: DataOptions) -> list[str]:
    room = model.max_position_embeddings
    if model.position_embedding_type == "rope":
        unused = f"--max-position-embeddings {room}: rotary positions have no limit; give none, or choose "
        return [unused + "--position-embedding-type learned_absolute"] if room is not None else []
    if room is None or room < 1:
        given = "is missing" if room is None else f"must be above 0, not {room}"
        return [
            f"--max-position-embeddings {given}: say how many positions --position-embedding-type learned_absolute has"
        ]
    if data.seq_length > room:
        return [
            f"--seq-length {data.seq_length} is longer than the model's {room} positions; choose at most {room}, or "
            "raise --max-position-embeddings"
        ]
    return []


def _divisors_text(model: ModelOptions) -> str:
    """The head counts nearest to what was asked for that divide the hidden size, rotary positions into even heads."""
    size, multiple = model.hidden_size, 2 if model.position_embedding_type == "rope" else 1
    start, nearest = min(model.num_attention_heads, size), set[int]()
    for distance in range(min(size, _LARGEST_DISTANCE)):
        for count in (start - distance, start + distance):
            if len(nearest) < 3 and 1 <= count <= size and size % (count * multiple) == 0:
                nearest.add(count)
    if not nearest and size % multiple == 0:
        nearest.add(1)
    return f"head counts that do: {', '.join(map(str, sorted(nearest)))}" if nearest else "choose an even hidden size"
