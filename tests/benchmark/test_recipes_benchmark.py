"""The stand-ins of the recipes are what the recipes say, and are preprocessed whole."""

import csv
import gzip
import itertools
import json
from pathlib import Path

import pytest
import zstandard

from megatron_plm.benchmark import recipes
from megatron_plm.benchmark.command import main
from megatron_plm.benchmark.recipes import RECIPES
from megatron_plm.data.readers import open_inputs

PROTEINS = ["MKTAYIAKQRQISFVKSHFS" * 20, "MKVLAGD" * 30, "ACDEFGHIKLMNPQRSTVWY" * 2]


@pytest.fixture
def fasta(tmp_path: Path) -> Path:
    path = tmp_path / "in.fasta"
    path.write_text("".join(f">p{i} x\n{protein}\n" for i, protein in enumerate(PROTEINS)))
    return path


def decompressed(path: Path) -> str:
    with gzip.open(path) if path.suffix == ".gz" else zstandard.open(path, "rb") as file:
        return file.read().decode()


def test_stand_ins_have_the_promised_size_format_and_few_equal_sequences(fasta: Path, tmp_path: Path) -> None:
    proteins = list(recipes._sequences(str(fasta)))
    assert proteins == PROTEINS
    for number, (name, recipe) in enumerate(RECIPES.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        text_bytes, compressed = recipes._stand_in(recipe, proteins, folder, 20_000)
        inputs = open_inputs([str(folder / recipe.pattern)])
        assert {source.format for source in inputs} == {"csv" if name == "OAS" else "fasta"}
        assert {source.kind for source in inputs} == {"compressed"}
        texts = [decompressed(Path(source.path)) for source in inputs]
        assert sum(map(len, texts)) == text_bytes >= 20_000
        assert compressed == sum(source.size for source in inputs)
        if name == "OAS":
            rows = [row for text in texts for row in itertools.islice(csv.reader(text.splitlines()), 1, None)]
            assert {len(row) for row in rows} == {92}
            assert len(texts) == 8
        if "--clusters" in recipe.flags:
            members = [line.split("\t")[1] for line in (folder / "clusters.tsv").read_text().splitlines()]
            assert members == [line.split()[0][1:] for line in texts[0].splitlines() if line.startswith(">")]


def test_every_recipe_runs_and_its_figures_are_told(
    fasta: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.json"
    assert main(["recipes", "--quick", "--megabytes", "1", "--input", str(fasta), "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    found = json.loads(output.read_text())["recipes"]
    assert list(found) == list(RECIPES)
    for name, figures in found.items():
        assert name in printed
        assert figures["text_bytes"] >= 10**6
        assert figures["peak_disk"] >= figures["dataset_bytes"] > 10_000
        assert figures["seconds"] > 0
