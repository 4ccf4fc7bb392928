"""Protein chains with sequence, C-alpha coordinates and secondary structure, read from PDB and mmCIF files.

Formats: the PDB format 3.3 and PDBx/mmCIF (wwPDB), parsed by gemmi (https://gemmi.readthedocs.io), plain or
gzipped. Only the first model is read, and of alternative conformations the first.
"""

import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from megatron_plm.errors import UserError
from tape_finetune.dssp import SS8_LETTERS, secondary_structure

if TYPE_CHECKING:
    import gemmi

SUFFIXES = (".pdb", ".ent", ".cif", ".mmcif")
BACKBONE = ("N", "CA", "C", "O")
_COIL = SS8_LETTERS.index("C")
_LONGEST_ALPHA_STEP = 4.5  # Å between neighbouring C-alphas; 3.8 is usual, more means that residues are missing
_SEQRES_AGREEMENT = 0.9  # share of residues that must carry the name SEQRES has in their place


class UnreadableStructure(UserError):
    """A file that holds no structure; among many files it's counted and passed over."""


@dataclass(frozen=True)
class Chain:
    """One protein chain of L residues, resolved or not.

    id: file stem and chain name, `1A8O_A`.
    primary: L one-letter codes; modified residues as their parent, unknown ones as X.
    alpha: [L, 3] float32, Å; zero where has_alpha is False.
    has_alpha: [L] bool, C-alpha observed.
    ss8: [L] uint8, classes as in dssp.SS8_LETTERS; coil where has_backbone is False.
    has_backbone: [L] bool, N, CA, C and O observed.
    """

    id: str
    primary: str
    alpha: NDArray[np.float32]
    has_alpha: NDArray[np.bool_]
    ss8: NDArray[np.uint8]
    has_backbone: NDArray[np.bool_]


def read_chains(path: Path) -> list[Chain]:
    """Return the protein chains of the first model of a file, in file order; an empty list if it has none.

    The sequence is the full one (SEQRES, _entity_poly_seq) where the file gives it; otherwise the observed
    residues, with X for the residues that the numbering skips where the chain is broken.
    Raises UnreadableStructure for a file that is missing, empty, damaged or of another kind, and UserError
    without gemmi.
    """
    structure = _parse(path)
    model = structure[0]
    polymers = [(chain.name, polymer) for chain in model if _is_protein(polymer := chain.get_polymer())]
    classes = _secondary_structure_of([polymer for _, polymer in polymers])
    stem = path.name.removesuffix(".gz").rsplit(".", 1)[0]
    return [
        _chain(f"{stem}_{name}", structure, polymer, letters)
        for (name, polymer), letters in zip(polymers, classes, strict=True)
    ]


def _parse(path: Path) -> "gemmi.Structure":
    try:
        import gemmi
    except ImportError as error:
        raise UserError(
            "reading PDB and mmCIF files needs the package gemmi; "
            "install it with: pip install 'megatron-plm[structures]'"
        ) from error
    content = _content(path)
    try:
        structure = gemmi.read_structure_string(content, format=gemmi.CoorFormat.Detect)
    except (ValueError, RuntimeError, IndexError) as error:
        reason = " ".join(str(error).split())
        raise UnreadableStructure(f"{path}: is not a readable PDB or mmCIF file ({reason})") from error
    if len(structure) == 0 or structure[0].count_atom_sites() == 0:
        raise UnreadableStructure(f"{path}: holds no atoms; expected a PDB or mmCIF file with coordinates")
    structure.setup_entities()
    structure.remove_alternative_conformations()
    structure.assign_label_seq_id()
    return structure


def _content(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UnreadableStructure(f"{path}: is a damaged or truncated gzip file; fetch it again") from error
    except OSError as error:
        raise UnreadableStructure(f"{path}: cannot be read ({error.strerror})") from error
    if not content.strip():
        raise UnreadableStructure(f"{path}: is empty; expected a PDB or mmCIF file")
    if b"\0" in content:
        raise UnreadableStructure(f"{path}: is binary; expected a PDB or mmCIF text file, plain or .gz")
    return content


def _is_protein(polymer: "gemmi.ResidueSpan") -> bool:
    import gemmi

    return polymer.check_polymer_type() in (gemmi.PolymerType.PeptideL, gemmi.PolymerType.PeptideD)


def _position(residue: "gemmi.Residue", name: str) -> list[float] | None:
    atom = residue.find_atom(name, "*")
    return atom.pos.tolist() if atom else None


def _secondary_structure_of(polymers: list["gemmi.ResidueSpan"]) -> list[dict[int, int]]:
    """Return, for each polymer, {index of the residue in it: ss8 class}.

    Residues without full backbone have no entry. All chains are worked on together, because strands pair
    across chains.
    """
    places: list[tuple[int, int]] = []
    backbone, is_proline = [], []
    for which, polymer in enumerate(polymers):
        for index, residue in enumerate(polymer):
            atoms = [_position(residue, name) for name in BACKBONE]
            if all(atom is not None for atom in atoms):
                places.append((which, index))
                backbone.append(atoms)
                is_proline.append(residue.name == "PRO")
    classes = secondary_structure(
        np.array(backbone, dtype=np.float64).reshape(-1, 4, 3),
        np.array([which for which, _ in places], dtype=np.int64),
        np.array(is_proline, dtype=bool),
    )
    result: list[dict[int, int]] = [{} for _ in polymers]
    for (which, index), letter in zip(places, classes.tolist(), strict=True):
        result[which][index] = letter
    return result


def _chain(id: str, structure: "gemmi.Structure", polymer: "gemmi.ResidueSpan", classes: dict[int, int]) -> Chain:
    placed = _place_in_seqres(structure, polymer) or _place_by_numbering(polymer)
    primary, places = placed
    length = len(primary)
    alpha = np.zeros((length, 3), dtype=np.float32)
    has_alpha = np.zeros(length, dtype=bool)
    ss8 = np.full(length, _COIL, dtype=np.uint8)
    has_backbone = np.zeros(length, dtype=bool)
    for index, (residue, place) in enumerate(zip(polymer, places, strict=True)):
        position = _position(residue, "CA")
        if position is not None:
            alpha[place], has_alpha[place] = position, True
        if index in classes:
            ss8[place], has_backbone[place] = classes[index], True
    return Chain(id, primary, alpha, has_alpha, ss8, has_backbone)


def _letter(name: str) -> str:
    """One-letter code; gemmi's tables give modified residues the lower-case letter of their parent."""
    import gemmi

    residue = gemmi.find_tabulated_residue(name)
    return residue.one_letter_code.upper() if residue.is_amino_acid() else "X"


def _place_in_seqres(structure: Any, polymer: "gemmi.ResidueSpan") -> tuple[str, list[int]] | None:
    """Return the full sequence and each observed residue's index in it, or None without a fitting one."""
    import gemmi

    entity = structure.get_entity_of(polymer)
    names = [gemmi.Entity.first_mon(item) for item in entity.full_sequence] if entity else []
    places = [(residue.label_seq or 0) - 1 for residue in polymer]
    in_order = all(a < b for a, b in zip([-1, *places], [*places, len(names)], strict=True))
    if not names or not in_order:
        return None
    agreeing = sum(residue.name == names[place] for residue, place in zip(polymer, places, strict=True))
    if agreeing < _SEQRES_AGREEMENT * len(places):
        return None
    return "".join(map(_letter, names)), places


def _place_by_numbering(polymer: "gemmi.ResidueSpan") -> tuple[str, list[int]]:
    """Return the observed sequence, with X for what the numbering skips at a chain break, and the indices."""
    letters: list[str] = []
    places = []
    previous = None
    for residue in polymer:
        if previous is not None:
            skipped = (residue.seqid.num or 0) - (previous.seqid.num or 0) - 1
            if skipped > 0 and _is_broken(previous, residue):
                letters += "X" * skipped
        places.append(len(letters))
        letters.append(_letter(residue.name))
        previous = residue
    return "".join(letters), places


def _is_broken(previous: "gemmi.Residue", residue: "gemmi.Residue") -> bool:
    """Are residues missing between the two? Numbering alone doesn't tell: many skip numbers on purpose."""
    first, second = _position(previous, "CA"), _position(residue, "CA")
    if first is None or second is None:
        return True
    return float(np.linalg.norm(np.subtract(first, second))) > _LONGEST_ALPHA_STEP
