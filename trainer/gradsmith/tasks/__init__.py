"""What can be trained: a task for each name that `data.task` may have.

A task is an objective (language modelling, classification, ...) over a modality, which its
processor knows (gradsmith.data).
"""

from __future__ import annotations

from pkgutil import resolve_name
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..data.processor import Processor
    from ..recipe import Recipe
    from .task import Task

TASKS = {
    "language_modeling": "language_modeling:LanguageModeling",
    "chat": "language_modeling:Chat",
    "text_classification": "classification:TextClassification",
    "image_classification": "image_classification:ImageClassification",
    "preference": "preference:Preference",
    "table": "table:Table",
}
"""data.task -> where its class is, below gradsmith.tasks; imported on use."""


def task_class(name: str) -> type[Task]:
    """The class of a task that the recipe has let through."""
    found: type[Task] = resolve_name(f"gradsmith.tasks.{TASKS[name]}")
    return found


def make_task(recipe: Recipe, processor: Processor) -> Task:
    """The recipe's task, over what `processor` encodes."""
    return task_class(recipe.data.task).of(recipe, processor)
