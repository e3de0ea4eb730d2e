"""Language models: the objective, its baselines and its samples."""

from .task import Chat, LanguageModeling

__all__ = ["Chat", "LanguageModeling"]
