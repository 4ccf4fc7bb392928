"""The downstream tasks, by the name that the commands take."""

from tape_finetune.tasks.base import Task
from tape_finetune.tasks.contact_prediction import ContactPrediction
from tape_finetune.tasks.csv_table import CsvTask
from tape_finetune.tasks.fluorescence import Fluorescence
from tape_finetune.tasks.localization import Localization
from tape_finetune.tasks.remote_homology import RemoteHomology
from tape_finetune.tasks.secondary_structure import SecondaryStructure
from tape_finetune.tasks.stability import Stability

__all__ = ["TASKS", "Task"]

_ALL: tuple[type[Task], ...] = (
    SecondaryStructure,
    ContactPrediction,
    RemoteHomology,
    Fluorescence,
    Stability,
    Localization,
    CsvTask,
)
TASKS: dict[str, type[Task]] = {task.name: task for task in _ALL}
