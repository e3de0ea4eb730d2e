"""Pictures with a class each -> batches of pixels, augmented as they are read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from gradsmith_kernels import augment
from gradsmith_kernels.augment.random import uniform_numbers

from ..errors import UserError
from ..files import file_entry, write_json
from ..hub import hub_name
from ..reading import read_json, reading
from ..shapes import ImageSettings
from .columns import Column, Columns
from .example import Dropped, Example, Ledger, content_digest
from .labelled import class_weights, classes_of
from .pixels import Unreadable, as_text, check_pillow, decode, decode_all, from_text, pool
from .processor import Batch, Processor, Row
from .readers import kind_of, label_of, value_of

CONFIG = "preprocessor_config.json"  # as transformers' image processors call it
INTERPOLATIONS = {"nearest": 0, "bilinear": 2, "bicubic": 3}  # with Pillow's numbers
CHUNK = 256
LISTED = 20  # pictures that are named in the ledger when they are left out; others are counted
SMALL = 64 * 64 * 3  # bytes of pixels that are stored as they are, however well they compress
MIXED = (1 << 31) - 2  # the stream of random numbers that says which pairs are mixed how


@dataclass(frozen=True)
class Sight:
    """How a picture becomes what the model sees: resized, cut to a square, normalised.

    Attributes:
        size: the square's edge.
        edge: what the shorter edge is resized to before the middle is cut out; None: the whole
            picture is squeezed into the square.
        mean, std: of the three channels, of pixels from 0 to 1.
        interpolation: nearest, bilinear or bicubic.
    """

    size: int
    edge: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bilinear"

    def steps(self) -> list[Any]:
        """Without anything random, up to the square."""
        if self.edge is None:
            return [augment.Resize((self.size, self.size), self.interpolation)]
        return [augment.Resize(self.edge, self.interpolation), augment.CenterCrop(self.size)]

    def normalize(self) -> Any:
        return augment.Normalize(self.mean, self.std)

    def config(self) -> dict[str, Any]:
        """As transformers' image processors have it."""
        square = {"height": self.size, "width": self.size}
        geometry: dict[str, Any] = {"image_processor_type": "ViTImageProcessor", "size": square}
        if self.edge is not None:
            geometry = {
                "image_processor_type": "BitImageProcessor",
                "size": {"shortest_edge": self.edge},
                "do_center_crop": True,
                "crop_size": square,
            }
        return {
            **geometry,
            "do_resize": True,
            "resample": INTERPOLATIONS[self.interpolation],
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
            "do_convert_rgb": True,
        }


def sight_of(recipe: Any) -> Sight:
    """What the recipe says; else what the model that it starts from was trained with; else the
    square of the model's config, and pixels from -1 to 1."""
    asked = recipe.data.image
    base = _sight_of_base(recipe)
    if base is None:
        size = recipe.image_size() or 224
        base = Sight(size, size, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    size = asked.size or base.size
    edge = base.edge and round(base.edge * size / base.size)
    return Sight(
        size,
        edge,
        tuple(asked.mean or base.mean),
        tuple(asked.std or base.std),
        base.interpolation,
    )


def _sight_of_base(recipe: Any) -> Sight | None:
    """What preprocessor_config.json of `model.from` says; None without one."""
    found = _base_config(recipe)
    if found is None:
        return None
    with reading(f"model.from: {recipe.model.from_}: {CONFIG}", "not one that can be used"):
        return _parsed(found)


def _base_file(recipe: Any) -> Path | None:
    """Where preprocessor_config.json of a local `model.from` is."""
    folder = Path(recipe.model.from_)
    runs = [folder, *folder.resolve().parents[:3]]  # of runs/NAME/checkpoints/step-000100/model
    places = [folder, folder / "model", *(run / "data" / "processor" for run in runs)]
    return next((place / CONFIG for place in places if (place / CONFIG).is_file()), None)


def _base_config(recipe: Any) -> dict[str, Any] | None:
    name = recipe.model.from_
    if name is None:
        return None
    if Path(name).exists():
        file = _base_file(recipe)
        return None if file is None else dict(read_json(file))
    from transformers import ImageProcessingMixin

    hub_name(name, "model.from", "a model")
    with reading(f"model.from: {name}: {CONFIG}", "not readable from the hub"):
        return dict(ImageProcessingMixin.get_image_processor_dict(name)[0])


def _parsed(config: Mapping[str, Any]) -> Sight:
    """A config of any of transformers' image processors of pictures with three channels."""
    size = config.get("size", 224)
    sizes = size if isinstance(size, dict) else {"shortest_edge": int(size)}
    crop, share = config.get("crop_size"), config.get("crop_pct")
    edge: int | None = sizes.get("shortest_edge")
    if config.get("do_center_crop") and crop:
        square = int(crop["height"] if isinstance(crop, dict) else crop)
        edge = edge or int(sizes["height"])
    elif edge is not None:
        square = int(edge)
        edge = int(square / share) if share and square < 384 else square
    else:
        square = int(sizes["height"])
    names = {number: name for name, number in INTERPOLATIONS.items()}
    return Sight(
        square,
        None if edge is None else max(int(edge), square),
        tuple(float(value) for value in config.get("image_mean") or [0.5] * 3),
        tuple(float(value) for value in config.get("image_std") or [0.5] * 3),
        names.get(int(config.get("resample", 2)), "bicubic"),
    )


class ImageSplit(Columns):
    """`file` with `offsets`; `shape` (height, width) where a row's file is bare pixels, and (0, 0)
    where it is a file to be decoded; `label`, the index of its class."""

    file: np.ndarray
    offsets: np.ndarray
    shape: np.ndarray
    label: np.ndarray


class ImageProcessor(Processor):
    """A picture as its file, or as its pixels where those are small.

    Args:
        sight: how it becomes what the model sees.
        classes: the labels of the training split, sorted, with how often each is there.
        recipe: of an image classification.
    """

    noun = "images"
    split_class = ImageSplit
    columns: Mapping[str, Column] = {
        "file": Column("|u1", offsets="offsets"),
        "shape": Column("<u4", (2,)),
        "label": Column("<i4"),
    }

    def __init__(self, sight: Sight, classes: dict[str, int], recipe: Any):
        self.sight, self.classes, self.recipe = sight, classes, recipe
        self.labels = list(classes)
        self.weights = class_weights(classes, recipe.objective.class_weights)
        self.plain = augment.Compose([*sight.steps(), sight.normalize()])
        self.random = augment.Compose(training_steps(recipe.objective.augment, sight))
        self.together = 2 if recipe.objective.mixup or recipe.objective.cutmix else 1
        self._index = {label: index for index, label in enumerate(self.labels)}
        self._named = 0

    @classmethod
    def check_source(cls, source: Any, where: str) -> None:
        check_pillow(where)

    @classmethod
    def reads(cls, source: Any) -> list[str]:
        return [source.image, source.label]

    @classmethod
    def example(cls, row: dict[str, Any], at: str, source: Any) -> Example:
        found = value_of(row, source.image, at)
        if isinstance(found, dict) and "bytes" in found:  # as the datasets library stores them
            found = found["bytes"]
        if not isinstance(found, bytes):
            raise UserError(
                f'{at}: "{source.image}", the picture, must be the bytes of a file; found '
                f"{kind_of(found)}"
            )
        return Example(at, {"image": as_text(found), "label": label_of(row, source.label, at)})

    @classmethod
    def group_of(cls, example: Example) -> bytes:
        """Equal files stay together, whatever their labels."""
        return content_digest(example.fields["image"])

    @classmethod
    def inputs(cls, recipe: Any) -> dict[str, Any]:
        """The config that is taken from the model, with its hash."""
        if not recipe.data.of_model() or recipe.model.from_ is None:
            return {}
        file = _base_file(recipe)
        return {"image_from": {CONFIG: file_entry(file)} if file else None}

    @classmethod
    def fit(
        cls,
        recipe: Any,
        examples: Callable[[], Iterable[Example]],
        ledger: Ledger,
        log: Callable[[str], None],
    ) -> Self:
        sight = sight_of(recipe)
        log(f"images: {sight.size} x {sight.size} pixels")
        counts: Counter[str] = Counter()  # of those that can be decoded: no others are trained on
        stream, first = iter(examples()), ""
        while chunk := list(islice(stream, CHUNK)):
            for example, pixels in zip(chunk, _decoded(chunk, sight), strict=True):
                if isinstance(pixels, Unreadable):
                    first = first or f"{example.source}: {pixels}"
                else:
                    counts[example.fields["label"]] += 1
        if not counts and first:
            raise UserError(f"data.sources: not one picture can be decoded; {first}")
        return cls(sight, classes_of(counts, log), recipe)

    def encode(self, examples: Sequence[Example], ledger: Ledger) -> list[Row | Dropped]:
        rows: list[Row | Dropped] = []
        refuse = self.recipe.data.image.on_error == "refuse"
        for example, pixels in zip(examples, _decoded(examples, self.sight), strict=True):
            label = example.fields["label"]
            ledger.add("decode", "in")
            if isinstance(pixels, Unreadable):
                if refuse:
                    raise UserError(
                        f"{example.source}: {pixels}; data.image.on_error: drop leaves such out"
                    )
                self._named += 1
                name = f": {example.source}" if self._named <= LISTED else ""
                rows.append(ledger.drop("decode", f"{pixels}{name}"))
            elif label not in self._index:
                reason = f'the training split has no row of the class "{label}"'
                rows.append(ledger.drop("decode", reason))
            else:
                ledger.add("decode", "kept")
                file = np.frombuffer(from_text(example.fields["image"]), np.uint8)
                bare = pixels.size <= max(SMALL, 2 * file.size)
                rows.append(
                    {
                        "file": pixels.reshape(-1) if bare else file,
                        "shape": np.array(pixels.shape[:2] if bare else (0, 0)),
                        "label": np.array(self._index[label]),
                    }
                )
        return rows

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "classes": self.classes}

    def dataset(self, split: ImageSplit, *, augment: bool = False) -> Images:
        return Images(self, split, augment)

    def dummy_inputs(self, rows: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        size = self.sight.size
        return {"pixel_values": torch.randn(rows, 3, size, size, generator=generator)}

    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(
            folder / "processor.json", {"classes": self.classes, "sight": asdict(self.sight)}
        )
        write_json(folder / CONFIG, self.sight.config())

    @classmethod
    def from_pretrained(cls, folder: Path, recipe: Any) -> Self:
        settings = read_json(folder / "processor.json", ImageSettings)
        found = settings["sight"]
        sight = Sight(**found | {key: tuple(found[key]) for key in ("mean", "std")})
        return cls(sight, settings["classes"], recipe)


def _decoded(examples: Sequence[Example], sight: Sight) -> list[np.ndarray | Unreadable]:
    files = [from_text(example.fields["image"]) for example in examples]
    return decode_all(files, sight.edge or sight.size)


def training_steps(asked: Any, sight: Sight) -> list[Any]:
    """The chain that `objective.augment` asks for, which runs in one pass."""
    size, smooth = sight.size, sight.interpolation
    around = "nearest" if smooth == "nearest" else "bilinear"
    steps = sight.steps()
    if asked.crop is not None:
        steps = [augment.RandomResizedCrop(size, tuple(asked.crop), interpolation=smooth)]
    if asked.pad:
        steps.append(augment.RandomCrop(size, asked.pad))
    if asked.flip:
        steps.append(augment.RandomHorizontalFlip(asked.flip))
    if asked.vertical_flip:
        steps.append(augment.RandomVerticalFlip(asked.vertical_flip))
    if asked.rotate:
        steps.append(augment.RandomRotation(asked.rotate, around))
    if asked.color_jitter is not None:
        steps.append(augment.ColorJitter(**asked.color_jitter.model_dump()))
    if asked.randaugment is not None:
        layers, magnitude = asked.randaugment.layers, asked.randaugment.magnitude
        steps.append(augment.RandAugment(layers, magnitude, interpolation=around))
    if asked.trivial_augment:
        steps.append(augment.TrivialAugmentWide(interpolation=around))
    steps.append(sight.normalize())
    if asked.erase:
        steps.append(augment.RandomErasing(asked.erase))
    return steps


class Images:
    """The rows of a split, a picture each."""

    reference: np.ndarray | None = None

    def __init__(self, processor: ImageProcessor, split: ImageSplit, augmented: bool):
        self.processor, self.split, self.augmented = processor, split, augmented
        self.lengths = np.ones(len(split), np.int64)
        self.items: np.ndarray = processor.weights[np.asarray(split.label)]

    def __len__(self) -> int:
        return len(self.items)

    def pixels(self, rows: Iterable[int]) -> list[np.ndarray]:
        """uint8 (H, W, 3) each."""
        return list(pool().map(self._picture, rows))

    def _picture(self, row: int) -> np.ndarray:
        found = self.split.row(row)
        height, width = (int(edge) for edge in found["shape"])
        if height:
            return np.array(found["file"]).reshape(height, width, 3)
        return decode(found["file"].tobytes())

    def batch(self, rows: Iterable[int], draws: np.ndarray | None = None) -> Batch:
        """inputs `pixel_values`, float32 (B, 3, size, size); labels `weight`, float32 (B,), and
        `target`: int64 (B,), or shares of the classes, float32 (B, C), where pairs are mixed."""
        rows = [int(row) for row in rows]
        size = self.processor.sight.size
        if not rows:
            nothing = {"target": torch.zeros(1, dtype=torch.long), "weight": torch.zeros(1)}
            return Batch({"pixel_values": torch.zeros(1, 3, size, size)}, nothing)
        target = torch.from_numpy(np.asarray(self.split.label)[rows].astype(np.int64))
        weight = torch.from_numpy(self.items[rows]).float()
        if self.augmented and draws is not None:
            pixels, target = self._augmented(self.pixels(rows), target, draws)
        else:
            pixels = self.processor.plain(self.pixels(rows), seed=0)
        return Batch({"pixel_values": pixels}, {"target": target, "weight": weight})

    def _augmented(
        self, pictures: list[np.ndarray], target: torch.Tensor, draws: np.ndarray
    ) -> tuple[torch.Tensor, torch.Tensor]:
        seed, objective = self.processor.recipe.seed, self.processor.recipe.objective
        pixels = self.processor.random(pictures, seed=seed, places=draws)
        mixes = {augment.MixUp: objective.mixup, augment.CutMix: objective.cutmix}
        asked = [kind(alpha=alpha) for kind, alpha in mixes.items() if alpha]
        if not asked:
            return pixels, target
        shares = torch.nn.functional.one_hot(target, len(self.processor.labels)).float()
        if len(asked) == 1:
            return asked[0](pixels, shares, seed=seed, places=draws)
        # Of both, each pair gets one: as its place says.
        which = (uniform_numbers(draws // np.uint64(2), seed, MIXED, 1)[:, 0] < 0.5).astype(int)
        for number, mix in enumerate(asked):
            part = torch.from_numpy(np.flatnonzero(which == number))
            mixed = mix(pixels[part], shares[part], seed=seed, places=draws[part.numpy()])
            pixels[part], shares[part] = mixed
        return pixels, shares


def pictures_of(pixels: torch.Tensor, sight: Sight) -> Iterator[np.ndarray]:
    """What the model sees, float (B, 3, H, W), as uint8 (H, W, 3) that a person can look at."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (sight.mean, sight.std))
    for image in pixels.float().cpu():
        shown = (image * std + mean).clamp(0, 1) * 255
        yield shown.round().byte().permute(1, 2, 0).numpy()
