"""Re-make the example data from its sources: `python examples/data/make_examples.py --help`, and see README.md.

Every draw is by SHA-256 of names or sequences, so the result depends on the sources and on nothing else.
"""

import argparse
import csv
import gzip
import hashlib
import io
import shutil
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from peptide_clusters import clusters_of

from megatron_plm.errors import UserError, run_command
from tape_finetune.structures_to_tape import main as structures_to_tape

NUM_PROTEINS, NUM_VALID_PROTEINS = 5000, 500
PROTEIN_LENGTHS = range(40, 1501)
PROTEIN_LETTERS = frozenset("ACDEFGHIKLMNPQRSTVWYXBZUO")
MOST_RELATIVES_IN_VALID = 3
RELATED_IDENTITY = 0.3
PEPTIDE_SPLITS = {"train": 0.7, "valid": 0.15, "test": 0.15}
LARGEST_HELD_OUT_CLUSTER = 30
STRUCTURE_SPLITS = "train=0.6,valid=0.2,test=0.2"
# Small files that show each case: modified residues, sheets across chains, DNA beside protein, altered residues,
# no SEQRES.
STRUCTURE_FILES = ("1A8O.pdb", "1GBT.cif", "1LCD.pdb", "2BEG.pdb", "3JQH.cif", "6WQA.cif")


def main(argv: Sequence[str]) -> None:
    """Make the parts whose source is given."""
    parser = argparse.ArgumentParser(description="Re-make examples/data from its sources; README.md says where from.")
    parser.add_argument("--uniprot", type=Path, help="DB.fasta.gz of the Debian package mmseqs2-examples; needs mmseqs")
    parser.add_argument("--peptides", type=Path, help="AMPvsUniProt.csv of the Python package modlamp")
    parser.add_argument("--structures", type=Path, help="the folder Tests/PDB of Biopython's source distribution")
    parser.add_argument("--output-dir", type=Path, default=Path(__file__).parent, help="default: the script's folder")
    arguments = parser.parse_args(argv)
    for flag, source, make in (
        ("--uniprot", arguments.uniprot, make_proteins),
        ("--peptides", arguments.peptides, make_peptides),
        ("--structures", arguments.structures, make_structures),
    ):
        if source is None:
            continue
        if not source.exists():
            raise UserError(f"{flag} {source}: no such file or folder; README.md in examples/data says how to get it")
        make(source, arguments.output_dir)


def digest(text: str) -> str:
    """The order of every draw."""
    return hashlib.sha256(text.encode()).hexdigest()


def write_gzip(path: Path, content: bytes) -> None:
    """Write content gzipped, without name and time: equal content gives equal bytes."""
    buffer = io.BytesIO()
    with gzip.GzipFile(filename="", fileobj=buffer, mode="wb", mtime=0) as file:
        file.write(content)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(buffer.getvalue())


# --- proteins for pretraining ---


def make_proteins(source: Path, output_dir: Path) -> None:
    """pretrain_{train,valid}.fasta.gz: one protein of each cluster, reviewed first, families held out whole."""
    proteins = {
        name: sequence
        for name, fragment, sequence in read_fasta(source)
        if len(sequence) in PROTEIN_LENGTHS and not fragment and PROTEIN_LETTERS.issuperset(sequence)
    }
    with tempfile.TemporaryDirectory() as folder:
        clusters = mmseqs_clusters(proteins, Path(folder))
        members = [min(cluster, key=draw_order) for cluster in clusters]
        chosen = {name: proteins[name] for name in sorted(members, key=draw_order)[:NUM_PROTEINS]}
        families = mmseqs_families(chosen, Path(folder))
    valid = held_out_proteins(families)
    splits = {
        "train": [name for name in proteins if name in chosen and name not in valid],
        "valid": [name for name in proteins if name in valid],
    }
    print(f"proteins: {len(proteins)} usable, {len(clusters)} clusters, {len(families)} families among {len(chosen)}")
    for split, names in splits.items():
        write_gzip(output_dir / f"pretrain_{split}.fasta.gz", fasta({name: proteins[name] for name in names}))
        reviewed = sum(map(is_reviewed, names))
        residues = sum(len(proteins[name]) for name in names)
        print(f"  {split}: {len(names)} proteins ({reviewed} reviewed), {residues} residues")


def held_out_proteins(families: list[set[str]]) -> set[str]:
    """Whole small families, with the share of reviewed entries that all families have."""
    names = [name for family in families for name in family]
    num_reviewed = round(NUM_VALID_PROTEINS * sum(map(is_reviewed, names)) / len(names))
    places = Counter({True: num_reviewed, False: NUM_VALID_PROTEINS - num_reviewed})
    valid: set[str] = set()
    for family in sorted(families, key=lambda family: digest(min(family))):
        taken = Counter(map(is_reviewed, family))
        if len(family) <= MOST_RELATIVES_IN_VALID and taken <= places:
            places -= taken
            valid |= family
    return valid


def is_reviewed(name: str) -> bool:
    """`sp|` is Swiss-Prot, `tr|` is TrEMBL."""
    return name.startswith("sp|")


def draw_order(name: str) -> tuple[bool, str]:
    """Reviewed entries before unreviewed ones, else by digest."""
    return not is_reviewed(name), digest(name)


def read_fasta(path: Path) -> Iterable[tuple[str, bool, str]]:
    """Yield (`db|ACC|NAME`, is it a fragment, sequence)."""
    with gzip.open(path, "rt") as file:
        # A header may itself hold `>`, as in `Beta-(1->3)-glucanase`.
        for record in ("\n" + file.read()).split("\n>")[1:]:
            header, _, body = record.partition("\n")
            yield header.split()[0], "(Fragment" in header, body.replace("\n", "").upper()


def fasta(proteins: dict[str, str]) -> bytes:
    """FASTA with lines of 60 letters, as UniProt writes it."""
    lines = []
    for name, sequence in proteins.items():
        lines += [f">{name}", *(sequence[start : start + 60] for start in range(0, len(sequence), 60))]
    return "".join(line + "\n" for line in lines).encode()


def mmseqs(*arguments: str | Path) -> None:
    """Run mmseqs on one thread."""
    if shutil.which("mmseqs") is None:
        raise UserError("--uniprot: the program mmseqs is not installed; install it with: apt-get install mmseqs2")
    subprocess.run(["mmseqs", *map(str, arguments), "--threads", "1", "-v", "1"], check=True)


def numbered_fasta(proteins: dict[str, str], path: Path) -> list[str]:
    """Write the proteins as 0, 1, ... (mmseqs shortens names to accessions) and return the names in that order."""
    path.write_bytes(fasta({str(number): sequence for number, sequence in enumerate(proteins.values())}))
    return list(proteins)


def mmseqs_clusters(proteins: dict[str, str], folder: Path) -> list[set[str]]:
    """Clusters at 50 % identity over 80 % of both proteins."""
    query, result = folder / "proteins.fasta", folder / "result"
    names = numbered_fasta(proteins, query)
    mmseqs("easy-cluster", query, result, folder / "work", "--min-seq-id", "0.5", "-c", "0.8")
    clusters: dict[str, set[str]] = defaultdict(set)
    for line in (folder / "result_cluster.tsv").read_text().splitlines():
        representative, member = line.split("\t")
        clusters[representative].add(names[int(member)])
    return list(clusters.values())


def mmseqs_families(proteins: dict[str, str], folder: Path) -> list[set[str]]:
    """Connected groups of proteins with a hit (E at most 0.001) at 30 % identity, at top sensitivity."""
    query, hits = folder / "chosen.fasta", folder / "hits.tsv"
    names = numbered_fasta(proteins, query)
    columns = "query,target,fident"
    mmseqs("easy-search", query, query, hits, folder / "work", "-s", "7.5", "-e", "0.001", "--format-output", columns)
    family = {name: {name} for name in names}
    for line in hits.read_text().splitlines():
        first, second, identity = line.split("\t")
        if float(identity) < RELATED_IDENTITY:
            continue
        one, other = family[names[int(first)]], family[names[int(second)]]
        if one is not other:
            one |= other
            family |= dict.fromkeys(other, one)
    return list({id(group): group for group in family.values()}.values())


# --- peptides ---


def make_peptides(source: Path, output_dir: Path) -> None:
    """peptides/{train,valid,test}.csv: distinct peptides, whole clusters in one split, equal shares of both labels."""
    with open(source, newline="") as file:
        rows = [(row[0].strip(), "amp" if row[1].strip() == "1" else "other") for row in list(csv.reader(file))[1:]]
    labels: dict[str, set[str]] = defaultdict(set)
    for sequence, label in rows:
        labels[sequence].add(label)
    peptides = {sequence: next(iter(own)) for sequence, own in sorted(labels.items()) if len(own) == 1}
    contradictory = len(labels) - len(peptides)
    clusters = clusters_of(list(peptides))
    split_of = split_clusters(clusters, peptides)
    print(f"peptides: {len(rows)} rows, {len(labels)} distinct, {contradictory} with both labels left out")
    print(f"  {len(clusters)} clusters, the largest of {max(map(len, clusters))}")
    for split in PEPTIDE_SPLITS:
        path = output_dir / "peptides" / f"{split}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["id", "sequence", "label", "cluster"])
            chosen = [
                (f"pep_{digest(sequence)[:10]}", sequence, peptides[sequence], f"c{number:04d}")
                for number, cluster in enumerate(clusters)
                if split_of[number] == split
                for sequence in cluster
            ]
            writer.writerows(sorted(chosen))
        print(f"  {split}: {dict(sorted(Counter(label for *_, label, _ in chosen).items()))}")


def split_clusters(clusters: Sequence[Sequence[str]], labels: dict[str, str]) -> list[str]:
    """Return the split of each cluster: large ones go to train, the others where most of their labels is missing."""
    totals = Counter(labels.values())
    wanted = {(split, label): share * totals[label] for split, share in PEPTIDE_SPLITS.items() for label in totals}
    missing = dict(wanted)
    result = [""] * len(clusters)
    order = sorted(
        range(len(clusters)),
        key=lambda number: (len(clusters[number]) <= LARGEST_HELD_OUT_CLUSTER, digest(min(clusters[number]))),
    )
    for number in order:
        counts = Counter(labels[sequence] for sequence in clusters[number])
        if len(clusters[number]) > LARGEST_HELD_OUT_CLUSTER:
            split = "train"
        else:
            # The share that each split still misses, averaged over the cluster's members.
            need = {
                split: sum(n * missing[split, label] / wanted[split, label] for label, n in counts.items())
                for split in PEPTIDE_SPLITS
            }
            split = max(need, key=need.__getitem__)
        for label, n in counts.items():
            missing[split, label] -= n
        result[number] = split
    return result


# --- structures ---


def make_structures(source: Path, output_dir: Path) -> None:
    """structures/: TAPE's records of all files, and a few of the files themselves to try the tool on."""
    target = output_dir / "structures"
    for name in STRUCTURE_FILES:
        write_gzip(target / "files" / f"{name}.gz", (source / name).read_bytes())
    structures_to_tape(["--input", str(source), "--output-dir", str(target), "--splits", STRUCTURE_SPLITS, "--force"])


if __name__ == "__main__":
    sys.exit(run_command(main))
