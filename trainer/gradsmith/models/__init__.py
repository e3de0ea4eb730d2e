"""From a recipe to a transformers model with adapters and our kernels, and back to folders."""
