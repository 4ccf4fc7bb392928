"""Secondary structure against mkdssp, residue by residue, and against ideal helices and sheets."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from tape_finetune.dssp import SS3_OF_SS8, SS8_LETTERS, secondary_structure

gemmi = pytest.importorskip("gemmi", reason="reading structures needs gemmi")
from mkdssp_reference import MKDSSP, STORED, STRUCTURES, first_model, run_mkdssp  # noqa: E402

FILES = sorted(path.name for path in STRUCTURES.iterdir())
MORE_STRUCTURES = os.environ.get("MEGATRON_PLM_PDB_DIR")
needs_mkdssp = pytest.mark.skipif(MKDSSP is None, reason="the program mkdssp (Debian: dssp) is not installed")


def letters(backbone: np.ndarray, chain: np.ndarray | None = None, proline: np.ndarray | None = None) -> str:
    num_residues = len(backbone)
    chain = np.zeros(num_residues, dtype=np.int64) if chain is None else chain
    proline = np.zeros(num_residues, dtype=bool) if proline is None else proline
    return "".join(SS8_LETTERS[c] for c in secondary_structure(backbone, chain, proline))


def assign(structure: "gemmi.Structure") -> dict[str, str]:
    """Our answer in the form of run_mkdssp."""
    keys, backbone, chain, proline = [], [], [], []
    for which, one in enumerate(structure[0]):
        for residue in one.get_polymer():
            atoms = [residue.find_atom(name, "*") for name in ("N", "CA", "C", "O")]
            if all(atoms):
                keys.append(f"{one.name} {residue.seqid}")
                backbone.append([atom.pos.tolist() for atom in atoms])
                chain.append(which)
                proline.append(residue.name == "PRO")
    return dict(zip(keys, letters(np.array(backbone), np.array(chain), np.array(proline)), strict=True))


@pytest.mark.parametrize("name", FILES)
def test_every_residue_has_the_stored_class_of_mkdssp(name):
    assert assign(first_model(STRUCTURES / name)) == json.loads(STORED.read_text())[name]


def test_the_stored_answers_hold_every_class():
    seen = {letter for answers in json.loads(STORED.read_text()).values() for letter in answers.values()}
    assert seen >= set("GHBESTC")


@needs_mkdssp
@pytest.mark.parametrize("name", FILES)
def test_stored_answers_are_those_of_the_installed_mkdssp(name):
    assert run_mkdssp(first_model(STRUCTURES / name)) == json.loads(STORED.read_text())[name]


@needs_mkdssp
@pytest.mark.parametrize(("name", "noise"), [("1GBT.cif.gz", 0.2), ("2BEG.pdb.gz", 0.3), ("6WQA.cif.gz", 0.3)])
def test_distorted_proteins_have_the_classes_of_mkdssp(name, noise):
    """Random shifts of all atoms (in Å) make broken ladders, bulges and helices of all kinds."""
    structure = first_model(STRUCTURES / name)
    generator = np.random.default_rng(7)
    for residue in (residue for chain in structure[0] for residue in chain):
        for atom in residue:
            shifted = np.array(atom.pos.tolist()) + generator.normal(scale=noise, size=3)
            atom.pos = gemmi.Position(*np.round(shifted, 3))
    assert assign(structure) == run_mkdssp(structure)


@needs_mkdssp
@pytest.mark.skipif(MORE_STRUCTURES is None, reason="MEGATRON_PLM_PDB_DIR names no folder of structure files")
def test_all_files_of_a_folder_agree_with_mkdssp():
    total = agreeing = 0
    for path in sorted(Path(str(MORE_STRUCTURES)).iterdir()):
        if path.suffix not in (".pdb", ".cif"):
            continue
        structure = first_model(path)
        if len(structure) == 0 or len(ours := assign(structure)) < 5:
            continue
        expected = run_mkdssp(structure)
        total += len(ours)
        agreeing += sum(expected.get(key) == letter for key, letter in ours.items())
        print(path.name, len(ours), {k: (expected.get(k), v) for k, v in ours.items() if expected.get(k) != v})
    print(f"{agreeing} of {total} residues agree")
    assert total > 0
    assert agreeing / total >= 0.99


# --- ideal structures ---


def place(a: np.ndarray, b: np.ndarray, c: np.ndarray, length: float, angle: float, torsion: float) -> np.ndarray:
    """The atom at `length` from c, with bond angle b-c-atom and torsion a-b-c-atom, in degrees."""
    angle, torsion = np.radians(angle), np.radians(torsion)
    axis = (c - b) / np.linalg.norm(c - b)
    normal = np.cross(b - a, axis)
    normal /= np.linalg.norm(normal)
    across = np.cos(torsion) * np.cross(normal, axis) + np.sin(torsion) * normal
    return c + length * (np.sin(angle) * across - np.cos(angle) * axis)


def ideal_chain(phi: float, psi: float, num_residues: int) -> np.ndarray:
    """[num_residues, 4, 3]: a chain of standard bond lengths and angles with the same torsions everywhere."""
    n, alpha = np.zeros(3), np.array([1.458, 0.0, 0.0])
    c = place(np.array([0.0, 1.0, 0.0]), n, alpha, 1.525, 111.0, phi)
    residues = []
    for _ in range(num_residues):
        residues.append([n, alpha, c, place(n, alpha, c, 1.231, 120.1, psi + 180)])
        next_n = place(n, alpha, c, 1.329, 116.6, psi)
        next_alpha = place(alpha, c, next_n, 1.458, 121.7, 180.0)
        n, alpha, c = next_n, next_alpha, place(c, next_n, next_alpha, 1.525, 111.0, phi)
    return np.array(residues)


def sheet_frame(strand: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors along a strand and across it, towards the C=O of its even residues."""
    axis = strand[-2, 1] - strand[0, 1]
    axis = axis / np.linalg.norm(axis)
    across = (strand[::2, 3] - strand[::2, 2]).mean(axis=0)
    across = across - axis * (across @ axis)
    return axis, across / np.linalg.norm(across)


@pytest.mark.parametrize(("phi", "psi", "letter"), [(-57, -47, "H"), (-49, -26, "G"), (-57, -70, "I")])
def test_ideal_helices_are_found_without_their_end_residues(phi, psi, letter):
    assert letters(ideal_chain(phi, psi, 16)) == "C" + 14 * letter + "C"


@needs_mkdssp
@pytest.mark.parametrize(("phi", "psi"), [(-57, -47), (-49, -26), (-57, -70), (-120, 120), (-63, -33), (-65, -58)])
def test_ideal_chains_have_the_classes_of_mkdssp(phi, psi):
    chain = gemmi.Chain("A")
    for number, residue_atoms in enumerate(ideal_chain(phi, psi, 24), start=1):
        residue = gemmi.Residue()
        residue.name, residue.seqid, residue.entity_type = "ALA", gemmi.SeqId(number, " "), gemmi.EntityType.Polymer
        for name, position in zip(("N", "CA", "C", "O"), np.round(residue_atoms, 3), strict=True):
            atom = gemmi.Atom()
            atom.name, atom.element, atom.pos = name, gemmi.Element(name[0]), gemmi.Position(*position)
            residue.add_atom(atom)
        chain.add_residue(residue)
    structure, model = gemmi.Structure(), gemmi.Model(1)
    model.add_chain(chain)
    structure.add_model(model)
    structure.setup_entities()
    assert assign(structure) == run_mkdssp(structure)


def test_an_extended_chain_alone_has_no_pattern():
    assert letters(ideal_chain(-120, 120, 12)) == 12 * "C"


def test_parallel_strands_make_a_ladder_across_chains():
    strand = ideal_chain(-120, 120, 10)
    axis, across = sheet_frame(strand)
    sheet = np.concatenate([strand, strand + 5.3 * across + 1.25 * axis])
    assert letters(sheet, np.repeat([0, 1], 10)) == 2 * "CEEEEEEEEC"


def test_antiparallel_strands_make_a_ladder():
    strand = ideal_chain(-139, 135, 10)
    axis, across = sheet_frame(strand)
    normal, centre = np.cross(axis, across), strand[:, 1].mean(axis=0)
    half_turn = 2 * np.outer(normal, normal) - np.eye(3)
    other = (strand - centre) @ half_turn + centre - 4.8 * across + 4.5 * axis
    assert letters(np.concatenate([strand, other]), np.repeat([0, 1], 10)) == 2 * "CCEEEEEEEC"


def test_a_lone_bridge_is_b_not_e():
    strand = ideal_chain(-120, 120, 3)
    long_strand = ideal_chain(-120, 120, 10)
    axis, across = sheet_frame(long_strand)
    shifted = long_strand + 5.3 * across + 1.25 * axis
    result = letters(np.concatenate([strand, shifted]), np.repeat([0, 1], [3, 10]))
    assert result.count("B") == 2
    assert "E" not in result


def test_a_chain_break_ends_a_helix():
    helix = ideal_chain(-57, -47, 16)
    broken = np.concatenate([helix[:8], helix[8:] + 20.0])
    assert letters(broken) == 2 * "CHHHHHHC"


def test_a_proline_gives_no_hydrogen_bond():
    """Without the N-H of residue 7 no turn starts at residue 3, so the helix and all turns end at residue 5."""
    helix = ideal_chain(-57, -47, 8)
    proline = np.zeros(8, dtype=bool)
    assert letters(helix, proline=proline) == "CHHHHHHC"
    proline[7] = True
    assert letters(helix, proline=proline) == "CHHHHHCC"


def test_classes_do_not_change_under_rotation_and_shift():
    structure = first_model(STRUCTURES / "1GBT.cif.gz")
    before = assign(structure)
    turn = gemmi.Mat33([[0.36, 0.48, -0.8], [-0.8, 0.6, 0.0], [0.48, 0.64, 0.6]])
    structure[0].transform_pos_and_adp(gemmi.Transform(turn, gemmi.Vec3(100, -50, 3)))
    assert assign(structure) == before


@pytest.mark.parametrize("num_residues", [0, 1, 2, 3, 4, 5])
def test_very_short_chains_are_coil(num_residues):
    assert letters(ideal_chain(-120, 120, 5)[:num_residues]) == num_residues * "C"


def test_eight_classes_map_to_three_as_in_the_tape_data():
    assert {letter: int(SS3_OF_SS8[i]) for i, letter in enumerate(SS8_LETTERS)} == {
        **dict.fromkeys("GHI", 0),
        **dict.fromkeys("BE", 1),
        **dict.fromkeys("STC", 2),
    }
