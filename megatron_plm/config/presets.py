"""Named model shapes. A preset sets only the keys listed; everything else keeps its default."""

from typing import Any

from megatron_plm.errors import UserError, suggestion

# ESM-2 shapes: Lin et al. 2023 (doi:10.1126/science.ade2574), table S1; `tiny` is ours, for tests and first steps.
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4},
    "esm2-8m": {"num_layers": 6, "hidden_size": 320, "num_attention_heads": 20},
    "esm2-35m": {"num_layers": 12, "hidden_size": 480, "num_attention_heads": 20},
    "esm2-150m": {"num_layers": 30, "hidden_size": 640, "num_attention_heads": 20},
    "esm2-650m": {"num_layers": 33, "hidden_size": 1280, "num_attention_heads": 20},
    "esm2-3b": {"num_layers": 36, "hidden_size": 2560, "num_attention_heads": 40},
    "esm2-15b": {"num_layers": 48, "hidden_size": 5120, "num_attention_heads": 40},
}


def preset_options(name: str, *, place: str = "--preset") -> dict[str, Any]:
    """The options that preset `name` sets; raises UserError for an unknown name, which stands at `place`."""
    if name not in PRESETS:
        raise UserError(f"{place}: unknown preset {name!r}; known are {', '.join(PRESETS)}{suggestion(name, PRESETS)}")
    return PRESETS[name]
