"""The recipe: one YAML file, one typed tree, dotted overrides.

`load_recipe` is the only way in. Whatever is wrong with a recipe is collected and reported at
once as a `UserError`: the dotted key, what was found, what is allowed, and the nearest name.
"""

from .data import (
    Clean,
    Data,
    LabelledData,
    LabelledSource,
    PairData,
    PairSource,
    Source,
    Split,
    TextData,
    TextSource,
    TokenizedData,
)
from .node import SMALLEST_TEMPERATURE, Node, Variant
from .objective import (
    DPO,
    IPO,
    KTO,
    OBJECTIVES,
    ORPO,
    ClassificationObjective,
    Preference,
    SimPO,
    TableObjective,
)
from .reading import load_recipe, parse_recipe, read_recipe, recipe_schema
from .table import TableData
from .training import (
    LENGTHS,
    OF_WHOLE_TENSORS,
    OPTIMIZERS,
    EarlyStopping,
    Muon,
    Optimizer,
    Training,
)
from .tree import (
    RECIPES,
    ChatRecipe,
    ImageClassificationRecipe,
    LanguageModelingRecipe,
    PreferenceRecipe,
    Recipe,
    TableRecipe,
    TextClassificationRecipe,
    TextRecipe,
)

__all__ = [
    "DPO",
    "IPO",
    "KTO",
    "LENGTHS",
    "OBJECTIVES",
    "OF_WHOLE_TENSORS",
    "OPTIMIZERS",
    "ORPO",
    "RECIPES",
    "SMALLEST_TEMPERATURE",
    "ChatRecipe",
    "ClassificationObjective",
    "Clean",
    "Data",
    "EarlyStopping",
    "ImageClassificationRecipe",
    "LabelledData",
    "LabelledSource",
    "LanguageModelingRecipe",
    "Muon",
    "Node",
    "Optimizer",
    "PairData",
    "PairSource",
    "Preference",
    "PreferenceRecipe",
    "Recipe",
    "SimPO",
    "Source",
    "Split",
    "TableData",
    "TableObjective",
    "TableRecipe",
    "TextClassificationRecipe",
    "TextData",
    "TextRecipe",
    "TextSource",
    "TokenizedData",
    "Training",
    "Variant",
    "load_recipe",
    "parse_recipe",
    "read_recipe",
    "recipe_schema",
]
