"""The fold of a protein domain, `fold_label`, one of 1,195 numbers (Rao et al. 2019, arXiv:1906.08230; data of Hou et
al. 2018, doi:10.1093/bioinformatics/btx780).

The test splits hold domains of superfamilies that train lacks (test_fold_holdout), of families that it lacks
(test_superfamily_holdout), and further ones of its families (test_family_holdout).
"""

from tape_finetune.tasks.classification import Classification
from tape_finetune.tasks.tape import TapeTask

NUM_FOLDS = 1195


class RemoteHomology(Classification, TapeTask):
    """`accuracy` is top-1, `top5_accuracy` the share of proteins whose fold is among the five that score highest."""

    name = "remote_homology"
    folder = "remote_homology"
    label_field = "fold_label"
    classes = tuple(str(fold) for fold in range(NUM_FOLDS))
    metric_names = ("accuracy", "top5_accuracy")
