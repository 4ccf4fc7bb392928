"""The heads that tasks on whole proteins share, and those of tasks on residues; the first is the default."""

from tape_finetune.heads import ConvHead, HeadTable, LinearHead, MLPHead
from tape_finetune.tape_heads import TapeConvHead, TapePooledHead

PROTEIN_HEADS: HeadTable = {"mlp": MLPHead, "linear": LinearHead, "tape": TapePooledHead}
RESIDUE_HEADS: HeadTable = {"conv": ConvHead, "linear": LinearHead, "tape": TapeConvHead}
