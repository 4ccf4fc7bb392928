"""Tensors stay in their files until each is needed, and files are written as they come."""

import json
import struct
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from convert_sample import CARRIED, PROTEINLM_TINY, TINY, convert, random_weights, written
from pretraining_runs import same_bits
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_plm.convert.command import size_in_bytes
from megatron_plm.convert.huggingface import read_huggingface, write_huggingface
from megatron_plm.convert.lazy import LazyTensors, compact, joined, meta_of, renamed
from megatron_plm.convert.native import read_native
from megatron_plm.convert.pretrained import FORMATS, load_pretrained
from megatron_plm.convert.tensor_files import read_tensors, write_safetensors, write_safetensors_shards
from megatron_plm.convert.weights import Weights
from megatron_plm.errors import UserError

STREAMING = ("native", "huggingface")  # the formats that are not one pickle


class Watched(LazyTensors):
    """Tensors that count how often each was read, and how many bytes of them were alive at once."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.reads: dict[str, int] = dict.fromkeys(tensors, 0)
        self.alive = self.most_alive = 0
        super().__init__(meta_of(tensors), lambda name: self._copy(name, tensors[name]))

    def _copy(self, name: str, tensor: Tensor) -> Tensor:
        self.reads[name] += 1
        memory = tensor.numpy().copy()  # lives as long as any view of the tensor
        self.alive += memory.nbytes
        self.most_alive = max(self.most_alive, self.alive)
        weakref.finalize(memory, self._gone, memory.nbytes)
        return torch.from_numpy(memory)

    def _gone(self, num_bytes: int) -> None:
        self.alive -= num_bytes


def watched(weights: Weights) -> tuple[Weights, Watched]:
    tensors = Watched(weights.tensors)
    return replace(weights, tensors=tensors), tensors


@pytest.mark.parametrize(("number", "target"), [(i, name) for i, (_, names) in enumerate(CARRIED) for name in names])
def test_each_tensor_is_read_once_and_let_go_before_the_next(number: int, target: str, tmp_path: Path) -> None:
    options, _ = CARRIED[number]
    weights, tensors = watched(random_weights(replace(options, num_layers=12)))
    written(weights, target, tmp_path / "out")
    assert set(tensors.reads.values()) == {1}
    largest = max(tensor.nbytes for tensor in meta_of(tensors).values())
    total = sum(tensor.nbytes for tensor in meta_of(tensors).values())
    if target in STREAMING:
        assert tensors.most_alive <= 2 * largest < total / 4


def test_a_rank_is_read_at_a_time(tmp_path: Path) -> None:
    weights, tensors = watched(random_weights(replace(PROTEINLM_TINY, num_layers=12, num_attention_heads=4)))
    FORMATS["megatron"].write(weights, tmp_path, "float32", target_tensor_parallel_size=4)
    assert set(tensors.reads.values()) == {4}


@pytest.mark.parametrize(
    ("target", "change"),
    [
        ("huggingface", {"activation": "swiglu"}),
        ("fair-esm", {"tokenizer": "tape-iupac"}),
        ("proteinlm-tape", {"norm_placement": "post"}),
        ("megatron", {}),
        ("tape", {}),
    ],
    ids=str,
)
def test_a_model_that_a_format_cannot_hold_is_refused_before_any_tensor_is_read(
    target: str, change: dict[str, str], tmp_path: Path
) -> None:
    weights, tensors = watched(random_weights(replace(TINY, **change)))
    with pytest.raises(UserError):
        FORMATS[target].write(weights, tmp_path, "float32")
    assert sum(tensors.reads.values()) == 0
    assert not list(tmp_path.iterdir())


def test_reading_a_checkpoint_reads_no_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, (options, names) in enumerate(CARRIED):
        for name in names:
            path = written(random_weights(options), name, tmp_path / f"{number} {name}")
            with monkeypatch.context() as patched:
                patched.setattr(LazyTensors, "__getitem__", lambda *_: pytest.fail("a tensor was read"))
                weights = FORMATS[name].read(path)
                assert len(weights.tensors) > 15
                assert "head.bias" in weights.tensors
            assert same_bits(dict(FORMATS[name].read(path).tensors), dict(weights.tensors))


def test_a_view_of_a_mapped_file_is_stored_alone(tmp_path: Path) -> None:
    source = written(random_weights(replace(TINY, num_layers=8)), "huggingface", tmp_path / "hf")
    size = (source / "model.safetensors").stat().st_size
    assert convert("huggingface", "native", source, tmp_path / "native") == 0
    assert sum(path.stat().st_size for path in (tmp_path / "native").iterdir()) < 2 * size  # DCP adds 1.5 kB a tensor
    whole = torch.arange(100.0)
    assert compact(whole).data_ptr() == whole.data_ptr()
    for view in (whole[10:20], whole.view(10, 10).T, whole[::2]):
        assert compact(view).untyped_storage().nbytes() == view.nbytes
        assert torch.equal(compact(view), view)


@pytest.mark.parametrize("shard_size", ["1KB", "10KB", "30KB"])
def test_shards_hold_all_tensors_once_and_no_more_than_asked(shard_size: str, tmp_path: Path) -> None:
    weights = random_weights()
    native = written(weights, "native", tmp_path / "native")
    out = tmp_path / "out"
    assert convert("native", "huggingface", native, out, "--shard-size", shard_size) == 0
    index = json.loads((out / "model.safetensors.index.json").read_text())
    shards = {path.name: load_file(path) for path in out.glob("*.safetensors")}
    count = len(shards)
    assert sorted(shards) == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    for name, tensors in shards.items():
        size = sum(tensor.nbytes for tensor in tensors.values())
        assert size <= size_in_bytes(shard_size) or len(tensors) == 1
        assert {key for key, place in index["weight_map"].items() if place == name} == set(tensors)
    assert sum(map(len, shards.values())) == len(index["weight_map"])
    assert index["metadata"]["total_size"] == sum(t.nbytes for tensors in shards.values() for t in tensors.values())
    assert same_bits(dict(read_huggingface(out).tensors), weights.tensors)
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(out).state_dict()
    assert torch.equal(theirs["lm_head.bias"], weights.tensors["head.bias"])


def test_a_size_that_all_fits_in_makes_one_file(tmp_path: Path) -> None:
    write_huggingface(random_weights(), tmp_path, shard_size=10**6)
    assert [path.name for path in tmp_path.glob("model*")] == ["model.safetensors"]


@pytest.mark.parametrize(
    ("text", "size"), [("500MB", 5 * 10**8), ("2 GiB", 2**31), ("10gb", 10**10), ("4096", 4096), ("1KB", 1000)]
)
def test_sizes_are_those_of_transformers(text: str, size: int) -> None:
    assert size_in_bytes(text) == size


@pytest.mark.parametrize("text", ["0", "-1", "5XB", "", "GB", "1.5GB"])
def test_what_is_no_size_is_refused(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert("native", "huggingface", tmp_path, tmp_path / "out", f"--shard-size={text}") == 2
    assert "is no size above 0" in capsys.readouterr().err


def test_safetensors_files_are_those_of_the_package(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "half": torch.randn(3, generator=generator).half(),
        "one": torch.randn((), generator=generator),
        "brain": torch.randn(5, 3, generator=generator).bfloat16(),
        "empty": torch.empty(0, 4),
        "count": torch.arange(7),
        "é view": torch.randn(6, 4, generator=generator).T,
        "flag": torch.tensor([True, False]),
        "double": torch.randn(2, generator=generator).double(),
    }
    write_safetensors(tensors, tmp_path / "ours")
    assert same_bits(load_file(tmp_path / "ours"), tensors)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / "theirs")
    (tmp_path / "theirs").rename(tmp_path / "model.safetensors")
    assert same_bits(dict(read_tensors(tmp_path)), tensors)
    content = (tmp_path / "ours").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    assert all(
        (8 + length + entry["data_offsets"][0]) % tensors[key].element_size() == 0 for key, entry in header.items()
    )


def test_a_stream_that_fails_leaves_the_sentence_it_failed_with(tmp_path: Path) -> None:
    def stream() -> Iterator[tuple[str, Tensor]]:
        yield "a", torch.ones(2)
        raise UserError("no more")

    with pytest.raises(UserError, match="no more"):
        write_safetensors_shards({"a": torch.ones(2, device="meta")}, stream(), tmp_path, 100)


def test_pickled_shards_are_read_and_a_damaged_one_is_told_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = random_weights()
    source = written(weights, "huggingface", tmp_path / "hf")
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    names = [f"pytorch_model-{i:05d}-of-00002.bin" for i in (1, 2)]
    halves = [dict(list(tensors.items())[i::2]) for i in range(2)]
    for name, half in zip(names, halves, strict=True):
        torch.save(half, source / name)
    weight_map = {key: name for name, half in zip(names, halves, strict=True) for key in half}
    (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert same_bits(dict(load_pretrained(source).model.state_dict()), weights.tensors)

    torch.save({**halves[1], next(iter(halves[0])): torch.ones(2)}, source / names[1])
    assert convert("huggingface", "native", source, tmp_path / "out") == 2
    assert f"{names[1]}: holds {next(iter(halves[0]))}, which {names[0]} holds, too" in capsys.readouterr().err
    (source / names[1]).write_bytes((source / names[0]).read_bytes()[:5000])
    assert convert("huggingface", "native", source, tmp_path / "out") == 2
    assert f"{names[1]}: cannot be read" in capsys.readouterr().err


def test_a_native_file_without_its_end_is_told_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = written(random_weights(), "native", tmp_path / "native")
    file = source / "__0_0.distcp"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[: size - 1])
    assert convert("native", "huggingface", source, tmp_path / "out") == 2
    assert f"__0_0.distcp has {size - 1:,} of at least {size:,} bytes" in capsys.readouterr().err
    file.unlink()
    with pytest.raises(UserError, match=r"__0_0\.distcp is missing"):
        read_native(source)


def test_mappings_of_tensors_read_only_what_is_looked_up() -> None:
    tensors = Watched({"a": torch.ones(2), "b": torch.zeros(3)})
    other = {"b": torch.full((4,), 7.0)}
    both = joined(tensors, other)
    assert (sorted(both), len(both), "c" in both, "a" in both) == (["a", "b"], 2, False, True)
    assert both.meta["b"].shape == (4,)
    assert torch.equal(both["b"], other["b"])
    assert sum(tensors.reads.values()) == 0
    again = renamed(both, {"x": "a"})
    assert list(again) == ["x"]
    assert torch.equal(again["x"], torch.ones(2))
    assert tensors.reads == {"a": 1, "b": 0}
    with pytest.raises(KeyError):
        again["a"]
