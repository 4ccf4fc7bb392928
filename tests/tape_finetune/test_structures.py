"""Reading protein chains from PDB and mmCIF files."""

import gzip
import sys
from pathlib import Path

import numpy as np
import pytest
from structure_sample import pdb_text

from megatron_plm.errors import UserError
from tape_finetune.structures import Chain, read_chains

gemmi = pytest.importorskip("gemmi", reason="reading structures needs gemmi")

FILES = Path(__file__).parents[2] / "examples" / "data" / "structures" / "files"


def only_chain(path: Path) -> Chain:
    (chain,) = read_chains(path)
    return chain


def test_modified_residues_become_their_parent_letter():
    chain = only_chain(FILES / "1A8O.pdb.gz")
    # SEQRES of 1A8O names three selenomethionines.
    assert chain.primary == "MDIRQGPKEPFRDYVDRFYKTLRAEQASQEVKNWMTETLLVQNANPDCKTILKALGPGATLEEMMTACQG"
    assert chain.has_alpha.all()
    assert chain.id == "1A8O_A"


def test_unresolved_residues_of_seqres_are_in_the_sequence_and_masked():
    """2BEG: residues 17-42 of amyloid beta were seen, the construct has 42."""
    chains = read_chains(FILES / "2BEG.pdb.gz")
    assert [chain.id for chain in chains] == ["2BEG_A", "2BEG_B", "2BEG_C", "2BEG_D", "2BEG_E"]
    for chain in chains:
        assert chain.primary == "DAEFRHDSGYEVHHQKLVFFAEDVGSNKGAIIGLMVGGVVIA"
        assert chain.has_alpha.tolist() == [False] * 16 + [True] * 26
        assert chain.has_backbone.tolist() == chain.has_alpha.tolist()
        assert (chain.alpha[:16] == 0).all()


def test_coordinates_are_those_of_the_file():
    with gzip.open(FILES / "2BEG.pdb.gz", "rt") as file:
        lines = [line for line in file if line[:6] == "ATOM  " and line[12:16] == " CA " and line[21] == "C"]
    expected = [[float(line[30:38]), float(line[38:46]), float(line[46:54])] for line in lines]
    chain = read_chains(FILES / "2BEG.pdb.gz")[2]
    np.testing.assert_allclose(chain.alpha[chain.has_alpha], expected, atol=1e-4)


def test_dna_is_no_protein_chain_and_only_the_first_model_counts():
    """1LCD: the head of the lac repressor with two DNA strands, three models."""
    chain = only_chain(FILES / "1LCD.pdb.gz")
    with gzip.open(FILES / "1LCD.pdb.gz", "rt") as file:
        first = next(line for line in file if line[:6] == "ATOM  " and line[12:16] == " CA ")
    assert chain.id == "1LCD_A"
    assert len(chain.primary) == 51
    np.testing.assert_allclose(chain.alpha[0], [float(first[30 + 8 * i : 38 + 8 * i]) for i in range(3)], atol=1e-4)


def test_a_residue_with_two_identities_is_read_once():
    """3JQH: residue 15 is arginine or glutamine."""
    chain = only_chain(FILES / "3JQH.cif.gz")
    assert chain.has_alpha.sum() == 23
    assert len(chain.primary) == 167


def test_without_seqres_gaps_are_filled_with_x_where_the_chain_is_broken(tmp_path):
    path = tmp_path / "gap.pdb"
    before = pdb_text([(number, "", "ALA") for number in range(5, 15)])
    after = pdb_text([(number, "", "GLY") for number in range(18, 28)], first=14)
    path.write_text(before.replace("TER\n", "") + after)
    chain = only_chain(path)
    assert chain.primary == "A" * 10 + "XXX" + "G" * 10
    assert chain.has_alpha.tolist() == [True] * 10 + [False] * 3 + [True] * 10


def test_numbers_skipped_along_an_unbroken_chain_are_no_gap(tmp_path):
    path = tmp_path / "skip.pdb"
    numbers = [(n, "") for n in range(1, 11)] + [(10, "A"), (10, "B")] + [(n, "") for n in range(40, 50)]
    path.write_text(pdb_text([(number, insertion, "SER") for number, insertion in numbers]))
    assert only_chain(path).primary == "S" * 22


def test_seqres_that_does_not_fit_is_not_used(tmp_path):
    path = tmp_path / "wrong.pdb"
    seqres = f"SEQRES   1 A   12  {' '.join(['TRP'] * 12)}\n"
    path.write_text(seqres + pdb_text([(number, "", "ALA") for number in range(1, 13)]))
    assert only_chain(path).primary == "A" * 12


def test_a_residue_without_full_backbone_is_masked_for_secondary_structure_only(tmp_path):
    path = tmp_path / "no_oxygen.pdb"
    lines = pdb_text([(number, "", "ALA") for number in range(1, 13)]).splitlines(keepends=True)
    path.write_text("".join(line for line in lines if not (line[13:14] == "O" and line[22:26] == "   4")))
    chain = only_chain(path)
    assert chain.has_alpha.all()
    assert chain.has_backbone.tolist() == [index != 3 for index in range(12)]


def test_mmcif_and_pdb_of_one_structure_give_equal_chains(tmp_path):
    structure = gemmi.read_structure(str(FILES / "2BEG.pdb.gz"))
    structure.setup_entities()
    structure.assign_label_seq_id()
    structure.make_mmcif_document().write_file(str(tmp_path / "2BEG.cif"))
    for one, other in zip(read_chains(FILES / "2BEG.pdb.gz"), read_chains(tmp_path / "2BEG.cif"), strict=True):
        assert (one.id, one.primary) == (other.id, other.primary)
        np.testing.assert_array_equal(one.ss8, other.ss8)
        np.testing.assert_allclose(one.alpha, other.alpha, atol=1e-3)


def test_without_gemmi_the_error_names_the_pip_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "gemmi", None)
    with pytest.raises(UserError, match=r"pip install 'megatron-plm\[structures\]'"):
        read_chains(FILES / "1A8O.pdb.gz")
