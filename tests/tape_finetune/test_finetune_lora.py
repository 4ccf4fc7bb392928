"""Adapters: what is trained, what is saved, and peft's own reader as the judge."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from finetune_sample import OPTIONS
from processes import REPOSITORY, environment
from safetensors.torch import load_file

from megatron_plm.convert.command import main as convert
from megatron_plm.errors import UserError
from megatron_plm.model.transformer import Encoder
from tape_finetune import train
from tape_finetune.batching import pack
from tape_finetune.data import Example
from tape_finetune.lora import Adapters, LoraOptions
from tape_finetune.model import transformer
from tape_finetune.runs import load_run

peft = pytest.importorskip("peft")
CSV = ["--sequence_column", "sequence", "--label_column", "label", "--kind", "classification"]


def _features(encoder: Encoder, tokenizer) -> torch.Tensor:
    packed = pack([Example("", "MKTAYIAKQRNDVW", None)], tokenizer)
    with torch.no_grad():
        return encoder(packed.tokens, packed.positions, packed.segment_ids, packed.cu_seqlens)


@pytest.fixture(scope="module")
def run(checkpoint, peptide_dir, tmp_path_factory) -> Path:
    """A run with everything at once."""
    folder = tmp_path_factory.mktemp("lora")
    flags = ["--data_dir", peptide_dir, *CSV, "--from_pretrained", checkpoint, "--output_dir", folder]
    flags += ["--exp_name", "all", "--num_train_epochs", "2", "--learning_rate", "1e-2", "--gradient_checkpointing"]
    flags += ["--lora_rank", "2", "--bf16", "--gradient_accumulation_steps", "2", "--export_encoder"]
    assert train.main([str(flag) for flag in ["transformer", "csv", *flags]]) == 0
    return folder / "all"


def test_saved_weights_are_the_base_models_with_the_adapters_added(run, checkpoint):
    saved, adapters = load_file(run / "model.safetensors"), load_file(run / "adapters" / "adapter_model.safetensors")
    before = transformer(checkpoint).encoder.state_dict()
    assert {name for name in saved if name.startswith("base.")} == {f"base.encoder.{name}" for name in before}
    for name, weights in before.items():
        after = saved[f"base.encoder.{name}"]
        if name.endswith(("attention.qkv.weight", "attention.out.weight")):
            matrix = f"base_model.model.{name.removesuffix('.weight')}"
            a, b = adapters[f"{matrix}.lora_A.weight"], adapters[f"{matrix}.lora_B.weight"]
            assert (a.shape[0], b.shape[1]) == (2, 2)
            assert b.abs().max() > 0
            torch.testing.assert_close(after, weights + 16 / 2 * b @ a, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(after, weights), name


def test_peft_reads_the_adapters_and_computes_the_same(run, checkpoint):
    base = transformer(checkpoint)
    before = _features(base.encoder, base.tokenizer)
    merged = load_run(run, base_model="transformer", task="csv").model.base
    peft.PeftModel.from_pretrained(base.encoder, str(run / "adapters"))
    after = _features(base.encoder.eval(), base.tokenizer)
    assert not torch.allclose(after, before, atol=1e-3)
    torch.testing.assert_close(after, _features(merged.encoder, base.tokenizer), rtol=1e-4, atol=1e-5)


def test_results_count_the_adapters(run):
    results = json.loads((run / "results.json").read_text())
    width, rank = OPTIONS.hidden_size, 2
    assert results["num_adapter_parameters"] == OPTIONS.num_layers * rank * (4 * width + 2 * width)
    saved = load_file(run / "model.safetensors")
    head = sum(t.numel() for name, t in saved.items() if name.startswith("head.") and "standardize" not in name)
    assert results["num_trained_parameters"] == results["num_adapter_parameters"] + head
    assert results["label"] == "Pretrained Transformer (LoRA)"


def test_a_run_with_adapters_is_scored_without_peft(run):
    before = json.loads((run / "results.json").read_text())
    code = (
        "import sys; sys.modules['peft'] = None; from megatron_plm.errors import run_command; "
        "from tape_finetune.evaluate import main; sys.exit(run_command(main))"
    )
    command = [sys.executable, "-c", code, "transformer", "csv", str(run), "--split", "test"]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert json.loads((run / "results.json").read_text()) == before


def test_the_exported_encoder_converts(run, tmp_path):
    output = tmp_path / "huggingface"
    words = ["--from", "native", "--to", "huggingface", "--input", run / "encoder", "--output", output]
    assert convert([str(word) for word in words]) == 0
    exported, trained = transformer(output), load_run(run, base_model="transformer", task="csv").model.base
    found, expected = (_features(base.encoder, base.tokenizer) for base in (exported, trained))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_first_weights_depend_on_the_seed_and_leave_the_model_as_it_is(checkpoint):
    options = LoraOptions(4, 16.0, 0.0, ("mlp.up",))
    bases = [transformer(checkpoint) for _ in range(3)]
    expected = _features(bases[0].encoder, bases[0].tokenizer)
    for base, seed in zip(bases, (1, 1, 2), strict=True):
        Adapters(base.encoder, options, seed, None)
        assert torch.equal(_features(base.encoder, base.tokenizer), expected)
    a, b, c = (dict(base.encoder.named_parameters())["blocks.1.mlp.up.lora_A.default.weight"] for base in bases)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert a.detach().std() == pytest.approx((3 * OPTIONS.hidden_size) ** -0.5, rel=0.2)


def test_a_target_that_is_no_matrix_is_an_error(checkpoint):
    with pytest.raises(
        UserError, match=r"--lora_targets query: the matrices of a block are attention.qkv, attention.out"
    ):
        Adapters(transformer(checkpoint).encoder, LoraOptions(4, 16.0, 0.0, ("query",)), 1, None)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["transformer", "--lora_alpha=8"], "--lora_alpha: has no use without --lora_rank"),
        (["transformer", "--lora_rank=4", "--freeze"], "--lora_rank: the encoder is not trained with --freeze"),
        (["transformer", "--bf16", "--freeze"], "--bf16: the encoder is not trained with --freeze"),
        (["onehot", "--gradient_checkpointing"], "--gradient_checkpointing: is for Transformers, not for onehot"),
        (["transformer", "--lora_rank=4", "--layer_lr_decay=0.8"], "--layer_lr_decay: is for the encoder's weights"),
        (["transformer", "--gradient_checkpointing", "--head=attention"], "--gradient_checkpointing: --head attention"),
        (["random", "--export_encoder"], "--export_encoder: is for the base model transformer"),
        (["transformer", "--lora_rank=4", "--lora_dropout=1"], "expected a number from 0 to below 1"),
        (["transformer", "--lora_rank=0"], "expected a whole number of at least 1"),
    ],
)
def test_flags_that_would_have_no_effect_are_errors(flags, message):
    with pytest.raises(UserError, match=message):
        train.main([flags[0], "csv", "--kind=classification", *flags[1:]])


def test_without_peft_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(
        UserError, match=r"--lora_rank: needs the package peft: run `pip install 'megatron-plm\[lora\]'`"
    ):
        train.main(["transformer", "csv", "--kind=classification", "--lora_rank", "4"])
