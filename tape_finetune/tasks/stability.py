"""Stability of designed miniproteins, `stability_score`: log10 of the protease concentration at which half is cut, less
what the unfolded sequence would need (Rao et al. 2019, arXiv:1906.08230; data of Rocklin et al. 2017,
doi:10.1126/science.aan0693)."""

from tape_finetune.tasks.regression import Regression
from tape_finetune.tasks.tape import TapeTask


class Stability(Regression, TapeTask):
    name = "stability"
    folder = "stability"
    label_field = "stability_score"
