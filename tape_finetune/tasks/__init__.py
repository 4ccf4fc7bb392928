"""The downstream tasks, by the name that the commands take."""

from tape_finetune.tasks.base import Task
from tape_finetune.tasks.contact_prediction import ContactPrediction
from tape_finetune.tasks.csv_table import CsvTask
from tape_finetune.tasks.secondary_structure import SecondaryStructure

__all__ = ["TASKS", "Task"]

TASKS: dict[str, type[Task]] = {task.name: task for task in (SecondaryStructure, ContactPrediction, CsvTask)}
