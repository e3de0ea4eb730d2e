"""Models for tables, as transformers' own: MLP, ResNet and FT-Transformer.

Gorishniy et al. 2021, "Revisiting Deep Learning Models for Tabular Data", arXiv 2106.11959, and for
numbers in bins Gorishniy et al. 2022, "On Embeddings for Numerical Features in Tabular Deep
Learning", arXiv 2203.05556. Where the papers normalise over the batch we normalise over the
features: with batch statistics, micro-batches and ranks would change what is learned.

Importing this module makes the model types known to transformers, so that
`AutoModelForTable.from_pretrained(folder)` reads what gradsmith has exported.
Letters: B rows, N numbers, M categories, D the size of an embedding, T bins.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.auto_factory import _BaseAutoModelClass

# -------------------------------------------------------------------------------------- configs


class TableConfig(PreTrainedConfig):
    """What the configs of all three have.

    Args:
        dropout: between layers.
        embedding_size: D, of a category; and of a number, where there are bins.
        bins: T, into how many a number is cut, at quantiles of the training split; 0: none.
        kwargs: what the data decide: `numbers`, N; `cardinalities`, how many values each of the M
            categories has; `edges`, N lists of at most T + 1 rising ends of the bins.

    Raises:
        ValueError: sizes that no model can have.
    """

    def __init__(
        self, dropout: float = 0.1, embedding_size: int = 16, bins: int = 0, **kwargs: Any
    ):
        self.numbers: int = kwargs.pop("numbers", 1)
        self.cardinalities: list[int] = kwargs.pop("cardinalities", [])
        self.edges: list[list[float]] = kwargs.pop("edges", [])
        self.dropout, self.embedding_size, self.bins = dropout, embedding_size, bins
        whole("embedding_size", embedding_size)
        whole("bins", bins, least=0)
        share("dropout", dropout)
        super().__init__(**kwargs)


class TableMLPConfig(TableConfig):
    """(Linear, ReLU, dropout) for each of `hidden_sizes`; [] is a linear model."""

    model_type = "table_mlp"

    def __init__(
        self,
        hidden_sizes: Sequence[int] = (256, 256),
        dropout: float = 0.1,
        embedding_size: int = 16,
        bins: int = 0,
        **kwargs: Any,
    ):
        if not isinstance(hidden_sizes, list | tuple):
            raise ValueError(f"hidden_sizes: found {hidden_sizes!r}; give a list: [256, 256]")
        for size in hidden_sizes:
            whole("hidden_sizes", size)
        self.hidden_sizes = list(hidden_sizes)
        super().__init__(dropout, embedding_size, bins, **kwargs)


class TableResNetConfig(TableConfig):
    """x + dropout(W₂·dropout(relu(W₁·norm(x)))) for each of `num_hidden_layers`."""

    model_type = "table_resnet"

    def __init__(
        self,
        hidden_size: int = 192,
        intermediate_size: int = 384,
        num_hidden_layers: int = 3,
        dropout: float = 0.1,
        embedding_size: int = 16,
        bins: int = 0,
        **kwargs: Any,
    ):
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        self.num_hidden_layers = num_hidden_layers
        whole("hidden_size", hidden_size)
        whole("intermediate_size", intermediate_size)
        whole("num_hidden_layers", num_hidden_layers)
        super().__init__(dropout, embedding_size, bins, **kwargs)


class FTTransformerConfig(TableConfig):
    """A token for each feature, and one from which the answer is read.

    D is `hidden_size` here.
    """

    model_type = "table_ft_transformer"

    def __init__(
        self,
        hidden_size: int = 64,
        intermediate_size: int = 128,
        num_hidden_layers: int = 3,
        num_attention_heads: int = 4,
        attention_dropout: float = 0.0,
        dropout: float = 0.1,
        bins: int = 0,
        **kwargs: Any,
    ):
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        self.attention_dropout = attention_dropout
        for name in ("hidden_size", "intermediate_size", "num_hidden_layers"):
            whole(name, getattr(self, name))
        whole("num_attention_heads", num_attention_heads)
        if hidden_size % num_attention_heads:
            raise ValueError(
                f"hidden_size: found {hidden_size}; allowed are multiples of num_attention_heads, "
                f"{num_attention_heads}"
            )
        share("attention_dropout", attention_dropout)
        super().__init__(dropout, kwargs.pop("embedding_size", hidden_size), bins, **kwargs)


def share(name: str, value: Any) -> None:
    """
    Raises:
        ValueError: it is no share of what is dropped out.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise ValueError(f"{name}: found {value!r}; allowed are 0 to below 1")


def whole(name: str, value: Any, least: int = 1) -> None:
    """
    Raises:
        ValueError: it is no whole number, or too small.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: found {value!r}; allowed are whole numbers from {least}")


# --------------------------------------------------------------------------------------- inputs


class NumberEmbedding(nn.Module):
    """(B, N) -> (B, N, D): each number by weights of its own.

    without bins  x·w + b
    with bins     relu(Σ_t ple(x)[t]·w[t] + b)
    ple(x)[t] = (x - e[t]) / (e[t+1] - e[t]), held within 0 and 1 but for the outermost bins,
                which go on beyond their ends
    """

    def __init__(self, config: TableConfig):
        super().__init__()
        self.bins, self.edges = config.bins, config.edges
        size = (config.numbers, max(1, config.bins), config.embedding_size)
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size[0], size[2]))
        self._ends: tuple[Tensor, ...] | None = None  # no buffers: rounded to 16 bits they move

    def forward(self, numbers: Tensor) -> Tensor:
        if not self.bins:
            return torch.addcmul(self.bias, numbers[..., None], self.weight[:, 0])
        if self._ends is None or self._ends[0].device != numbers.device:
            self._ends = tuple(part.to(numbers.device) for part in self._read_edges())
        start, width, low, high = self._ends
        places = ((numbers.float()[..., None] - start) / width).clamp(low, high)
        found = torch.einsum("bnt,ntd->bnd", places.to(self.weight.dtype), self.weight)
        return F.relu(found + self.bias)

    def _read_edges(self) -> tuple[Tensor, ...]:
        """Where each bin starts, how wide it is, and what its share is held within: float32
        (N, T) each. A number with fewer ends than others has fewer bins, and 0 in the rest."""
        size = self.weight.shape[:2]
        start, width, low, high = (torch.full(size, value) for value in (0.0, 1.0, 0.0, 0.0))
        for i, ends in enumerate(self.edges):
            count = len(ends) - 1
            if count < 1:
                continue
            edges = torch.tensor(ends)
            start[i, :count], width[i, :count] = edges[:-1], edges.diff()
            high[i, :count] = 1.0
            low[i, 0], high[i, count - 1] = -torch.inf, torch.inf
        return start, width, low, high


class CategoryEmbedding(nn.Embedding):
    """int64 (B, M) -> (B, M, D): one table for all categories, the values of each in a row."""

    def __init__(self, config: TableConfig):
        *firsts, rows = accumulate(config.cardinalities, initial=0)
        super().__init__(rows, config.embedding_size)
        self.firsts = firsts

    def forward(self, categories: Tensor) -> Tensor:
        return super().forward(categories + torch.tensor(self.firsts, device=categories.device))


class FlatFeatures(nn.Module):
    """(B, N), (B, M) -> (B, `size`): numbers as they are, or in bins, and categories embedded."""

    def __init__(self, config: TableConfig):
        super().__init__()
        self.numbers = NumberEmbedding(config) if config.bins and config.numbers else None
        self.categories = CategoryEmbedding(config) if config.cardinalities else None
        each = config.embedding_size
        self.size = config.numbers * (each if config.bins else 1)
        self.size += len(config.cardinalities) * each

    def forward(self, numbers: Tensor, categories: Tensor) -> Tensor:
        parts = [numbers if self.numbers is None else self.numbers(numbers).flatten(1)]
        if self.categories is not None:
            parts.append(self.categories(categories).flatten(1))
        return torch.cat(parts, dim=1)


# --------------------------------------------------------------------------------------- models


class TableModel(PreTrainedModel):
    """forward(numbers, categories) -> logits (B, num_labels); `num_labels` 1 is one number."""

    config_class: Any = TableConfig
    main_input_name = "numbers"
    base_model_prefix = "table"
    supports_gradient_checkpointing = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As torch does it: uniform within 1/sqrt(inputs)."""
        if isinstance(module, nn.Linear):
            bound = module.in_features**-0.5
        elif isinstance(module, NumberEmbedding | CategoryEmbedding | AnswerToken):
            bound = module.weight.shape[-1] ** -0.5
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
            return
        else:
            return
        for parameter in module.parameters(recurse=False):
            init.uniform_(parameter, -bound, bound)


def outputs_of(config: TableConfig) -> int:
    labels = config.num_labels
    assert labels is not None
    return labels


class TableMLP(TableModel):
    """Linear(dropout(relu(Linear(...)))) of all features side by side."""

    config_class = TableMLPConfig

    def __init__(self, config: TableMLPConfig):
        super().__init__(config)
        self.features = FlatFeatures(config)
        sizes = [self.features.size, *config.hidden_sizes]
        self.layers = nn.ModuleList(
            MLPLayer(before, after, config.dropout) for before, after in pairwise(sizes)
        )
        self.head = nn.Linear(sizes[-1], outputs_of(config))
        self.post_init()

    def forward(self, numbers: Tensor, categories: Tensor) -> SequenceClassifierOutput:
        hidden = self.features(numbers, categories)
        for layer in self.layers:
            hidden = layer(hidden)
        return SequenceClassifierOutput(logits=self.head(hidden))


class MLPLayer(GradientCheckpointingLayer):
    def __init__(self, before: int, after: int, dropout: float):
        super().__init__()
        self.linear, self.dropout = nn.Linear(before, after), nn.Dropout(dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.dropout(F.relu(self.linear(hidden)))


class TableResNet(TableModel):
    """Linear, residual layers, and Linear(relu(norm(x)))."""

    config_class = TableResNetConfig

    def __init__(self, config: TableResNetConfig):
        super().__init__(config)
        self.features = FlatFeatures(config)
        self.first = nn.Linear(self.features.size, config.hidden_size)
        self.layers = nn.ModuleList(ResNetLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size)
        self.head = nn.Linear(config.hidden_size, outputs_of(config))
        self.post_init()

    def forward(self, numbers: Tensor, categories: Tensor) -> SequenceClassifierOutput:
        hidden = self.first(self.features(numbers, categories))
        for layer in self.layers:
            hidden = layer(hidden)
        return SequenceClassifierOutput(logits=self.head(F.relu(self.norm(hidden))))


class ResNetLayer(GradientCheckpointingLayer):
    def __init__(self, config: TableResNetConfig):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size)
        self.up = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        inner = self.dropout(F.relu(self.up(self.norm(hidden))))
        return hidden + self.dropout(self.down(inner))


class FTTransformer(TableModel):
    """Attention among the features' tokens; the answer is read from a token of its own."""

    config_class = FTTransformerConfig
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: FTTransformerConfig):
        super().__init__(config)
        self.numbers = NumberEmbedding(config) if config.numbers else None
        self.categories = CategoryEmbedding(config) if config.cardinalities else None
        self.answer = AnswerToken(config.hidden_size)
        self.layers = nn.ModuleList(FTLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size)
        self.head = nn.Linear(config.hidden_size, outputs_of(config))
        self.post_init()

    def forward(self, numbers: Tensor, categories: Tensor) -> SequenceClassifierOutput:
        tokens = [self.answer(len(numbers))]
        if self.numbers is not None:
            tokens.append(self.numbers(numbers))
        if self.categories is not None:
            tokens.append(self.categories(categories))
        hidden = torch.cat(tokens, dim=1)
        for layer in self.layers:
            hidden = layer(hidden)
        return SequenceClassifierOutput(logits=self.head(F.relu(self.norm(hidden[:, 0]))))


class AnswerToken(nn.Module):
    """(B, 1, D), the same for each row."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))

    def forward(self, rows: int) -> Tensor:
        return self.weight.expand(rows, 1, -1)


class FTLayer(GradientCheckpointingLayer):
    """x + attention(norm(x)), then x + W₂·dropout(relu(a)·b), (a, b) = W₁·norm(x)."""

    def __init__(self, config: FTTransformerConfig):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size)
        self.attention = FTAttention(config)
        self.norm = nn.LayerNorm(config.hidden_size)
        self.up = nn.Linear(config.hidden_size, 2 * config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.attention(self.attention_norm(hidden))
        gate, value = self.up(self.norm(hidden)).chunk(2, dim=-1)
        return hidden + self.down(self.dropout(F.relu(gate) * value))


class FTAttention(nn.Module):
    """Every token sees every other; by whatever attention the config names."""

    def __init__(self, config: FTTransformerConfig):
        super().__init__()
        self.config, self.is_causal = config, False
        size = config.hidden_size
        self.head_size = size // config.num_attention_heads
        self.q, self.k, self.v, self.out = (nn.Linear(size, size) for _ in range(4))

    def forward(self, hidden: Tensor) -> Tensor:
        shape = (*hidden.shape[:2], -1, self.head_size)
        q, k, v = (part(hidden).view(shape).transpose(1, 2) for part in (self.q, self.k, self.v))
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation or "sdpa", sdpa_attention_forward
        )
        dropout = self.config.attention_dropout if self.training else 0.0
        found, _ = attend(self, q, k, v, None, dropout=dropout, scaling=self.head_size**-0.5)
        return self.out(found.flatten(2))


# -------------------------------------------------------------------------------------- by name


class AutoModelForTable(_BaseAutoModelClass):
    """transformers' from_config and from_pretrained, for these models."""

    _model_mapping: Any = {  # noqa: RUF012
        TableMLPConfig: TableMLP,
        TableResNetConfig: TableResNet,
        FTTransformerConfig: FTTransformer,
    }


ARCHITECTURES = {
    "mlp": TableMLPConfig.model_type,
    "resnet": TableResNetConfig.model_type,
    "ft_transformer": FTTransformerConfig.model_type,
}
"""model.architecture -> transformers' model type."""

for config_class in AutoModelForTable._model_mapping:
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
