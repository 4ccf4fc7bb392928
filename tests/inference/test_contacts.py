"""Contact maps equal transformers' predict_contacts, and are drawn."""

import struct

import matplotlib.image
import numpy as np
import pytest
import torch
from inference_sample import (
    our_checkpoint,
    peer_checkpoint,
    random_sequences,
    run,
    with_specials,
    write_fasta,
)
from transformers import EsmForMaskedLM

from megatron_plm.convert.command import main as convert
from megatron_plm.convert.pretrained import load_pretrained
from megatron_plm.inference.contacts import _draw, contact_map
from megatron_plm.inference.proteins import Protein
from megatron_plm.inference.runner import Runner

TOLERANCE = 1e-5  # both compute in fp32; probabilities
SEQUENCES = random_sequences([31, 2, 17, 1], seed=4, letters="LAGVSERTIDPKQNFYMHWCX")


@pytest.fixture(scope="module")
def peer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peer")
    model = peer_checkpoint(folder / "model")
    model.esm.contact_head.regression.weight.data *= 10  # so that probabilities vary
    model.save_pretrained(folder / "model")
    # Only this implementation hands out attention weights.
    model = EsmForMaskedLM.from_pretrained(folder / "model", attn_implementation="eager").eval()
    names = ["sp|P1|A_HUMAN", "../é x", "b", "b"]
    write_fasta(folder / "in.fasta", SEQUENCES, names)
    return folder, model


@torch.no_grad()
def expected_maps(model):
    return [
        model.predict_contacts(torch.tensor([with_specials(s)]), torch.ones(1, len(s) + 2))[0].numpy()
        for s in SEQUENCES
    ]


def contacts(folder, output, *flags):
    base = ["--checkpoint", folder / "model", "--input", folder / "in.fasta", "--output", output]
    return run("score", "contacts", *base, *flags)


def png_size(path):
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", content[16:24])


def test_maps_equal_transformers_and_are_drawn(peer, tmp_path, capsys):
    folder, model = peer
    assert contacts(folder, tmp_path / "out") == 0
    names = ["00001_sp_P1_A_HUMAN", "00002_.._", "00003_b", "00004_b"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(
        f"{n}.{e}" for n in names for e in ("npz", "png")
    )
    varied = 0.0
    for name, expected in zip(names, expected_maps(model), strict=True):
        with np.load(tmp_path / "out" / f"{name}.npz") as file:
            found = file["contacts"]
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() <= TOLERANCE
        varied = max(varied, float(np.ptp(expected)))
        width, height = png_size(tmp_path / "out" / f"{name}.png")
        assert min(width, height) > 500
    assert varied > 0.1
    assert str(np.load(tmp_path / "out" / "00002_.._.npz")["id"]) == "../é"
    assert "the contacts of 4 proteins" in capsys.readouterr().out


@pytest.mark.parametrize("route", [["native"], ["native", "huggingface"]])
def test_converted_checkpoints_give_the_same_maps(peer, tmp_path, route):
    folder, model = peer
    source, kind = folder / "model", "huggingface"
    for number, target in enumerate(route):
        output = tmp_path / str(number)
        base = ["--from", kind, "--to", target, "--input", str(source), "--output", str(output)]
        assert convert(base) == 0
        source, kind = output, target
    pretrained = load_pretrained(source)
    runner = Runner(pretrained, torch.device("cpu"), torch.float32)
    for sequence, expected in zip(SEQUENCES, expected_maps(model), strict=True):
        found = contact_map(runner, pretrained.contact_head, pretrained.tokenizer.encode(sequence))
        assert np.abs(found - expected).max() <= TOLERANCE


def test_the_model_is_as_before_after_a_map(peer):
    folder, _ = peer
    pretrained = load_pretrained(folder / "model")
    runner = Runner(pretrained, torch.device("cpu"), torch.float32)
    before = [type(block.attention.attend) for block in pretrained.model.encoder.blocks.values()]
    contact_map(runner, runner.contact_head, pretrained.tokenizer.encode("MKV"))
    assert [type(block.attention.attend) for block in pretrained.model.encoder.blocks.values()] == before


def test_a_picture_has_a_pixel_for_each_residue_and_any_name(tmp_path, recwarn):
    name = "蛋白 $x$ \\frac " + "long " * 40
    _draw(tmp_path / "map.png", Protein(name, np.zeros(900, np.int64)), np.eye(900, dtype=np.float32))
    width, height = png_size(tmp_path / "map.png")
    assert min(width, height) > 900
    # The diagonal, one pixel wide at least, is one dark stretch a row: 900 rows of the map's own.
    pixels = matplotlib.image.imread(tmp_path / "map.png")[..., :3].sum(-1)
    left, top = np.array([0.7, 0.3]) / 4.8 * height  # inches of the map's corner
    inside = pixels[
        round(top) + 5 : round(top + height / 4.8 * 4) - 5, round(left) + 5 : round(left + height / 4.8 * 4) - 5
    ]
    assert (inside.min(1) < 1.0).all()
    assert [str(warning.message) for warning in recwarn] == []


def test_a_checkpoint_without_contact_head_is_refused(tmp_path, capsys):
    our_checkpoint(tmp_path / "model")
    write_fasta(tmp_path / "in.fasta", SEQUENCES)
    assert contacts(tmp_path, tmp_path / "out") == 2
    assert "model: it has no contact head" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_proteins_longer_than_the_model_takes_are_refused_before_any_work(peer, tmp_path, capsys):
    folder, _ = peer
    assert contacts(folder, tmp_path / "out", "--max-length", 32) == 2
    told = capsys.readouterr().err
    assert "protein 'sp|P1|A_HUMAN' has 31 residues" in told
    assert "at most 30 residues here" in told
    assert list(tmp_path.iterdir()) == []


def test_force_replaces_a_folder_of_maps_and_no_other(peer, tmp_path, capsys):
    folder, _ = peer
    assert contacts(folder, tmp_path / "out") == 0
    assert contacts(folder, tmp_path / "out") == 2
    assert "out exists already; give another --output, or --force" in capsys.readouterr().err
    assert contacts(folder, tmp_path / "out", "--force") == 0
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert contacts(folder, tmp_path / "out", "--force") == 2
    assert "is no output of this command" in capsys.readouterr().err
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
