"""The peer: secondary structure as the program `mkdssp` 4 (Debian package dssp) assigns it.

`python tests/tape_finetune/mkdssp_reference.py > tests/tape_finetune/mkdssp_4.2.2.json` re-makes the stored answers.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import gemmi

STRUCTURES = Path(__file__).parents[2] / "examples" / "data" / "structures" / "files"
STORED = Path(__file__).with_name("mkdssp_4.2.2.json")
MKDSSP = shutil.which("mkdssp")


def first_model(path: Path) -> gemmi.Structure:
    """The first model with the first of alternative conformations, ligands and water left out."""
    structure = gemmi.read_structure(str(path), format=gemmi.CoorFormat.Detect)
    structure.setup_entities()
    structure.remove_alternative_conformations()
    while len(structure) > 1:
        del structure[-1]
    structure.remove_ligands_and_waters()
    return structure


def run_mkdssp(structure: gemmi.Structure) -> dict[str, str]:
    """Return {chain residue number: letter} with mkdssp's poly-proline helix (P) and blank as C.

    mkdssp gets a minimal PDB file: it stops at headers it doesn't like, takes residues with two identities twice, and
    overlooks modified residues that SEQRES doesn't name.
    """
    for entity in structure.entities:
        if entity.entity_type == gemmi.EntityType.Polymer and not entity.full_sequence:
            entity.full_sequence = [residue.name for residue in structure[0].get_subchain(entity.subchains[0])]
    options = gemmi.PdbWriteOptions(minimal=True)
    options.seqres_records = True
    header = f"{'HEADER    UNKNOWN':50}01-JAN-00   1XXX"
    with tempfile.NamedTemporaryFile("w", suffix=".pdb") as file:
        file.write(f"{header:80}\n{structure.make_pdb_string(options)}")
        file.flush()
        command = ["mkdssp", "--output-format", "dssp", file.name]
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    table = lines[next(i for i, line in enumerate(lines) if line.startswith("  #  RESIDUE")) + 1 :]
    return {
        f"{line[11]} {line[5:11].strip()}": "C" if line[16] in " P" else line[16] for line in table if line[13] != "!"
    }


if __name__ == "__main__":
    answers = {path.name: run_mkdssp(first_model(path)) for path in sorted(STRUCTURES.iterdir())}
    json.dump(answers, sys.stdout, indent=0)
