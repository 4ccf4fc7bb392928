"""Brightness of mutants of the green fluorescent protein, `log_fluorescence`: log10 of it (Rao et al. 2019,
arXiv:1906.08230; data of Sarkisyan et al. 2016, doi:10.1038/nature17995)."""

from functools import partial
from typing import ClassVar

from tape_finetune import metrics
from tape_finetune.tasks.base import Observations
from tape_finetune.tasks.regression import Regression
from tape_finetune.tasks.tape import TapeTask

DARK_BELOW = 2.5  # log10; between the two modes, as TAPE divides them


class Fluorescence(Regression, TapeTask):
    """The values have two modes, and a model that only tells them apart ranks well over the split. So metrics within
    each come besides: `_dark` over the proteins whose label is below DARK_BELOW, `_bright` over the others."""

    name = "fluorescence"
    folder = "fluorescence"
    label_field = "log_fluorescence"
    metric_names = tuple(f"{metric}{mode}" for mode in ("", "_bright", "_dark") for metric in Regression.metric_names)
    lower_is_better: ClassVar[frozenset[str]] = frozenset({"mse", "mse_bright", "mse_dark"})

    def metrics(self, observations: Observations) -> dict[str, metrics.Metric]:
        table = super().metrics(observations)
        is_dark = observations["truth"] < DARK_BELOW
        for mode, index in (("_bright", ~is_dark), ("_dark", is_dark)):
            inside = super().metrics({name: values[index] for name, values in observations.items()})
            for name, metric in inside.items():
                table[f"{name}{mode}"] = partial(metrics.within, metric=metric, index_n=index)
        return table
