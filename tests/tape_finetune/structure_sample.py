"""PDB files made up for the tests."""


def pdb_text(residues: list[tuple[int, str, str]], chain: str = "A", first: int = 0) -> str:
    """A straight chain of residues (number, insertion code, name), neighbouring C-alphas 3.8 Å apart.

    `first` is the place of the first residue along the line: a later one makes a chain break.
    """
    lines: list[str] = []
    for index, (number, insertion, name) in enumerate(residues):
        x = 3.8 * (index + first)
        for atom, dx, dy in (("N", -1.2, 0.6), ("CA", 0.0, 0.0), ("C", 1.2, 0.6), ("O", 1.3, 1.8)):
            lines.append(
                f"ATOM  {len(lines) + 1:5d}  {atom:<3} {name:>3} {chain}{number:4d}{insertion:1}   "
                f"{x + dx:8.3f}{dy:8.3f}{0.0:8.3f}  1.00 10.00           {atom[0]}  "
            )
    return "\n".join([*lines, "TER", ""])
