"""gradsmith: from raw data to a trained, measured and explained model, from one recipe."""

__version__ = "0.1.0"
