"""The key-map mechanism and the tables built with it."""

from dataclasses import replace

import pytest
import torch
from convert_sample import SAMPLE, SHAPES, TINY, random_weights
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_plm.convert import bert, fair_esm, hf_esm, megatron, proteinlm_tape, tape
from megatron_plm.convert.keymap import Entry, KeyMap, Transform, module
from megatron_plm.convert.transforms import chain, repeat, split_qkv, vocabulary_rows
from megatron_plm.convert.weights import CONTACT_HEAD, Weights, contact_head_shapes, native_shapes
from megatron_plm.errors import UserError
from megatron_plm.tokenizers import get_tokenizer, token_roles

ESM2 = get_tokenizer("esm2")


def map_of(format_name: str, weights: Weights) -> KeyMap:
    options, tokenizer = weights.options, weights.tokenizer
    if format_name == "huggingface":
        return hf_esm.key_map(options, tokenizer, tokenizer.tokens)
    if format_name == "megatron":
        ranks = options.num_attention_heads  # a head each
        return megatron.key_map(
            options, tokenizer, tokenizer.tokens, version=0, tensor_parallel_size=ranks, vocabulary_rows_stored=128
        )
    if format_name == "tape":
        same = vocabulary_rows(tokenizer.tokens, tokenizer.tokens)
        return bert.key_map(options, same, tape.LAYOUT, num_token_types=2)
    if format_name == "proteinlm-tape":
        return proteinlm_tape.key_map(options, vocabulary_rows(tokenizer.tokens, tokenizer.tokens))
    return fair_esm.key_map(options, tokenizer)


TABLES = ["huggingface", "tape", "proteinlm-tape", "fair-esm", "megatron"]


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("format_name", TABLES)
def test_a_table_read_there_and_back_changes_nothing(format_name: str, shape: tuple[int, int, int, int]) -> None:
    layers, hidden, heads, inner = shape
    sizes = {"num_layers": layers, "hidden_size": hidden, "num_attention_heads": heads, "ffn_hidden_size": inner}
    weights = random_weights(replace(SAMPLE[format_name], **sizes))
    key_map = map_of(format_name, weights)
    theirs = key_map.apply(weights.tensors, "ours")
    assert equal(key_map.inverse.apply(theirs, "theirs"), weights.tensors)
    assert equal(key_map.inverse.inverse.apply(weights.tensors, "ours"), theirs)
    assert key_map.inverse.inverse == key_map


@pytest.mark.parametrize("format_name", TABLES)
def test_a_table_claims_every_tensor_of_the_model_once(format_name: str) -> None:
    weights = random_weights(SAMPLE[format_name])
    claimed = [key for entry in map_of(format_name, weights).entries for key in entry.ours if key not in CONTACT_HEAD]
    assert sorted(claimed) == sorted(native_shapes(weights.options, weights.tokenizer))


def test_the_table_names_exactly_the_tensors_of_transformers_model() -> None:
    transformers = pytest.importorskip("transformers")
    from transformers_peer import esm_config

    theirs = {k: v.shape for k, v in transformers.EsmForMaskedLM(esm_config(TINY)).state_dict().items()}
    mapped = map_of("huggingface", random_weights()).shapes({**native_shapes(TINY, ESM2), **contact_head_shapes(TINY)})
    # Versions of transformers keep the rotary frequencies in one place or in every layer.
    mapped = {key: shape for key, shape in mapped.items() if "inv_freq" not in key}
    theirs = {key: shape for key, shape in theirs.items() if "inv_freq" not in key}
    assert {key: shape for key, shape in theirs.items() if key not in hf_esm.NOT_CARRIED} == mapped


def test_a_key_claimed_twice_is_a_fault_of_the_table() -> None:
    with pytest.raises(ValueError, match="claims x twice"):
        KeyMap.build([Entry(("a",), ("x",)), Entry(("b",), ("x",))], num_layers=1)
    with pytest.raises(ValueError, match=r"claims layer\.1 twice"):
        KeyMap.build([Entry(("a.{i}",), ("x.{i}",)), Entry(("b",), ("layer.{i}",)), Entry(("c",), ("layer.1",))], 2)


def test_missing_and_left_over_keys_are_listed_in_both_directions() -> None:
    key_map = KeyMap.build(module("a.{i}", "x.{i}"), num_layers=2)
    one = torch.ones(1)
    with pytest.raises(UserError, match=r"ours: 1 tensor is missing \(a\.1\.bias\) and 1 tensor is unknown \(b\)"):
        key_map.apply({"a.0.weight": one, "a.0.bias": one, "a.1.weight": one, "b": one}, "ours")
    with pytest.raises(UserError, match=r"theirs: 3 tensors are missing \(x\.0\.bias, x\.1\.bias, x\.1\.weight\)"):
        key_map.inverse.apply({"x.0.weight": one}, "theirs")


def test_a_wildcard_on_one_side_gathers_all_layers() -> None:
    key_map = KeyMap.build([Entry(("one",), ("each.{i}",), repeat(3), optional=("each.{i}",))], num_layers=3)
    tensor = torch.arange(2.0)
    theirs = key_map.apply({"one": tensor}, "ours")
    assert equal(theirs, dict.fromkeys(["each.0", "each.1", "each.2"], tensor))
    assert equal(key_map.inverse.apply({"each.2": tensor}, "theirs"), {"one": tensor})
    assert key_map.inverse.apply({}, "theirs") == {}
    with pytest.raises(UserError, match=r"theirs: each\.0, each\.1, each\.2: they must be equal"):
        key_map.inverse.apply({**theirs, "each.1": tensor + 1}, "theirs")


def test_entries_are_run_when_their_tensors_are_asked_for() -> None:
    runs = []

    def double(tensors: list[Tensor]) -> list[Tensor]:
        runs.extend(tensor.item() for tensor in tensors if not tensor.is_meta)
        return [tensor * 2 for tensor in tensors]

    table = [Entry((f"a{i}",), (f"x{i}",), Transform(double, double)) for i in range(3)]
    key_map, ours = KeyMap.build(table, num_layers=1), {f"a{i}": torch.tensor(float(i)) for i in range(3)}
    lazy = key_map.lazy(ours, "ours")
    assert (list(lazy), runs) == (["x0", "x1", "x2"], [])
    assert (lazy["x2"].item(), runs) == (4.0, [2.0])
    stream = key_map.stream(ours, "ours")
    assert (next(stream), runs) == (("x0", torch.tensor(0.0)), [2.0, 0.0])
    with pytest.raises(UserError, match="1 tensor is unknown"):
        key_map.stream({**ours, "b": torch.ones(1)}, "ours")
    with pytest.raises(UserError, match="1 tensor is missing"):
        key_map.lazy({"a0": torch.ones(1), "a1": torch.ones(1)}, "ours")


def test_a_chain_runs_backwards_in_reverse_order() -> None:
    add = Transform(lambda ts: [t + 1 for t in ts], lambda ts: [t - 1 for t in ts])
    double = Transform(lambda ts: [t * 2 for t in ts], lambda ts: [t / 2 for t in ts])
    both = chain(add, double)
    assert both.forward([torch.tensor(3.0)]) == [torch.tensor(8.0)]
    assert both.backward([torch.tensor(8.0)]) == [torch.tensor(3.0)]
    assert both.inverse.forward([torch.tensor(8.0)]) == [torch.tensor(3.0)]


@given(heads=st.integers(1, 5), size=st.integers(1, 4), width=st.integers(0, 3))
def test_query_key_and_value_take_their_rows_of_each_head(heads: int, size: int, width: int) -> None:
    shape = (heads * 3 * size, width) if width else (heads * 3 * size,)  # without width: a bias
    qkv = torch.arange(torch.Size(shape).numel()).view(shape)
    transform = split_qkv(heads)
    parts = transform.forward([qkv])
    for which, part in enumerate(parts):
        for head in range(heads):
            for row in range(size):
                assert torch.equal(part[head * size + row], qkv[head * 3 * size + which * size + row])
    assert torch.equal(transform.backward(parts)[0], qkv)


@given(st.permutations(ESM2.tokens), st.integers(0, 2))
def test_vocabulary_rows_follow_their_tokens(theirs: list[str], width: int) -> None:
    table = torch.arange(33 * max(width, 1)).view(33, width) if width else torch.arange(33)
    transform = vocabulary_rows(ESM2.tokens, theirs)
    (moved,) = transform.forward([table])
    assert all(torch.equal(moved[theirs.index(token)], table[i]) for i, token in enumerate(ESM2.tokens))
    assert torch.equal(transform.backward([moved])[0], table)


def test_a_token_without_a_row_stops_only_the_direction_that_needs_it() -> None:
    transform = vocabulary_rows(["a", "b", "c"], ["c", "a"])
    assert transform.forward([torch.tensor([0, 1, 2])])[0].tolist() == [2, 0]
    with pytest.raises(ValueError, match="no row for b"):
        transform.backward([torch.tensor([2, 0])])


def test_special_tokens_of_the_two_vocabularies_match_by_role() -> None:
    iupac = get_tokenizer("tape-iupac")
    assert set(token_roles(ESM2)) - set(token_roles(iupac)) == {".", "-", "<null_1>"}
    assert set(token_roles(iupac)) <= set(token_roles(ESM2))
    assert token_roles(iupac)[iupac.tokens.index("<sep>")] == "<eos>"
