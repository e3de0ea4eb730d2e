"""A picture's class, by any of transformers' image classifiers."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..blocks import Examination, Image, Images, Result
from ..data.image import ImageProcessor, ImageSplit, pictures_of
from ..data.loader import evaluation_batches
from ..data.pixels import png
from ..data.prepared import PreparedData
from ..data.processor import Batch
from ..errors import UserError
from .classification import BATCH, Classification
from .task import Subject

SHEET, SALIENT = 24, 6  # pictures of a sheet, and how many are looked into
SHOWN = 96  # pixels: smaller pictures are enlarged in the report
BASELINE_EDGE, BASELINE_ROWS, BASELINE_CLASSES = 16, 5000, 200


class ImageClassification(Classification):
    """One of C classes a picture. Training pictures are augmented, and mixed in pairs whose targets
    are then shares of two classes; a mixed row weighs what its own class does."""

    unit = "images"
    auto_class = "AutoModelForImageClassification"
    architectures = "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES"
    models_are = "image classifiers"
    for_example = "vit, dinov2, convnext, swin, resnet"
    peft_saves = ("classifier",)
    processor: ImageProcessor

    @classmethod
    def implied(cls, recipe: Any) -> dict[str, Any]:
        return {"image_size": recipe.image_size() or 224}

    @classmethod
    def meta_inputs(cls, recipe: Any) -> dict[str, torch.Tensor] | None:
        if recipe.model.from_ is not None and recipe.image_size() is None:
            return None  # what the model was trained with, which its folder says
        size = recipe.image_size() or 224
        return {"pixel_values": torch.zeros(1, 3, size, size, device="meta")}

    @torch.no_grad()
    def check_model(self, model: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        batch = Batch(self.processor.dummy_inputs(1, generator), {})
        parameter, was_training = next(model.parameters()), model.training
        try:
            self.outputs(model.eval(), batch.to(parameter.device, parameter.dtype))
        except (ValueError, RuntimeError) as error:
            told = " ".join(str(error).split())[:200]
            raise UserError(
                f"data.image.size: {self.processor.sight.size} does not fit the model at "
                f"{self.recipe.model.from_}: {told}"
            ) from None
        finally:
            model.train(was_training)

    def rows_in_words(self, rows: int) -> str:
        size = self.processor.sight.size
        return f"{rows:,} images of {len(self.labels)} classes, at {size} x {size}"

    @classmethod
    def examined(cls, recipe: Any, split: str) -> tuple[str, ...]:
        return (split, "train")

    def examine(self, subject: Subject) -> Examination:
        found = super().examine(subject)
        train, held_out = subject.data.split("train"), subject.data.split(subject.split)
        if len(self.labels) <= BASELINE_CLASSES:
            reads = (
                f"Logistic regression reads the pixels, averaged to {BASELINE_EDGE} x "
                f"{BASELINE_EDGE} at most, of up to {BASELINE_ROWS:,} training images."
            )
            self.beside(found, self._linear(subject.data, held_out), "on pixels", reads)
        found.blocks.append(self._training_sheet(train))
        logits = torch.cat(list(self._logits(subject.model, held_out)))
        target = torch.from_numpy(np.asarray(held_out.label).astype(np.int64))
        if (mistakes := self._mistakes(held_out, logits, target)) is not None:
            found.blocks.append(mistakes)
        found.blocks.append(self._saliency(subject.model, held_out, logits, target))
        return found

    # ------------------------------------------------------------------------------ baseline

    def _linear(self, data: PreparedData, held_out: ImageSplit) -> Result | None:
        """Logistic regression on small pictures; None without scikit-learn."""
        try:
            from sklearn.linear_model import LogisticRegression
            from sklearn.pipeline import make_pipeline
            from sklearn.preprocessing import StandardScaler
        except ImportError:
            return None
        x, y = self._small(data.split("train"), BASELINE_ROWS)
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=300))
        x_held, y_held = self._small(held_out, len(held_out))
        logp = np.full((len(x_held), len(self.labels)), -50.0)
        logp[:, np.unique(y)] = model.fit(x, y).predict_log_proba(x_held)
        sums = self.sums.sums(torch.from_numpy(logp), torch.from_numpy(y_held))
        return {
            "name": "logistic regression",
            "values": self.sums.summarize(sums),
            "note": "on pixels",
        }

    def _small(self, split: ImageSplit, limit: int) -> tuple[np.ndarray, np.ndarray]:
        """(rows, pixels), and classes, of rows spread evenly over a split."""
        chosen = np.linspace(0, len(split) - 1, min(limit, len(split))).astype(int)
        dataset, parts = self.processor.dataset(split), []
        edge = min(BASELINE_EDGE, self.processor.sight.size)
        for first in range(0, len(chosen), BATCH):
            pixels = dataset.batch(chosen[first : first + BATCH]).inputs["pixel_values"]
            parts.append(F.adaptive_avg_pool2d(pixels, edge).flatten(1))
        return torch.cat(parts).numpy(), np.asarray(split.label)[chosen].astype(np.int64)

    # ------------------------------------------------------------------------------- pictures

    @torch.no_grad()
    def _logits(self, model: Any, split: ImageSplit) -> Iterator[torch.Tensor]:
        parameter = next(model.parameters())
        rows = self.processor.dataset(split)
        for batch in evaluation_batches(rows, rank=0, world=1, batch=BATCH):
            yield self.outputs(model, batch.to(parameter.device, parameter.dtype)).float().cpu()

    def _pictures(self, pixels: torch.Tensor) -> list[str]:
        """PNG files in base64."""
        return [_base64(picture) for picture in pictures_of(pixels, self.processor.sight)]

    def _training_sheet(self, train: ImageSplit) -> Images:
        """Training pictures as the model sees them, in the first step and in two later ones."""
        count = min(SHEET // 3 // 2 * 2, len(train) // 2 * 2)
        rows = np.linspace(0, len(train) - 1, count).astype(int)
        dataset = self.processor.dataset(train, augment=True)
        images: list[Image] = []
        for time in range(3):
            draws = np.arange(count, dtype=np.uint64) + np.uint64(time * count)
            batch = dataset.batch(rows, draws)
            targets = batch.labels["target"]
            for shown, target in zip(
                self._pictures(batch.inputs["pixel_values"]), targets, strict=True
            ):
                images.append({"png": shown, "caption": self._target_in_words(target)})
        return {
            "kind": "images",
            "title": "Training images, as the model sees them",
            "note": f"{count} images, each augmented three times as objective says.",
            "images": images,
        }

    def _target_in_words(self, target: torch.Tensor) -> str:
        if target.dim() == 0:
            return self.labels[int(target)]
        shares = [(float(share), index) for index, share in enumerate(target) if share > 0]
        ordered = sorted(shares, reverse=True)
        if len(ordered) == 1:
            return self.labels[ordered[0][1]]
        return ", ".join(f"{self.labels[index]} {share:.0%}" for share, index in ordered)

    def _mistakes(
        self, split: ImageSplit, logits: torch.Tensor, target: torch.Tensor
    ) -> Images | None:
        """The rows that the model is surest of, and wrong."""
        sure, answer = logits.softmax(-1).max(-1)
        wrong = torch.nonzero(answer != target)[:, 0]
        chosen = wrong[sure[wrong].argsort(descending=True, stable=True)][:SHEET].tolist()
        if not chosen:
            return None
        pixels = self.processor.dataset(split).batch(chosen).inputs["pixel_values"]
        images: list[Image] = [
            {
                "png": shown,
                "caption": " taken for ".join(self.labels[int(of[i])] for of in (target, answer)),
                "note": f"{float(sure[i]):.1%} sure",
            }
            for i, shown in zip(chosen, self._pictures(pixels), strict=True)
        ]
        return {
            "kind": "images",
            "title": "The surest mistakes",
            "note": f"{len(wrong):,} of {len(target):,} images are mistaken.",
            "images": images,
        }

    def _saliency(
        self, model: Any, split: ImageSplit, logits: torch.Tensor, target: torch.Tensor
    ) -> Images:
        """|∂ logit of the answer / ∂ pixel|, the largest of the channels, from black to white."""
        answer = logits.argmax(-1)
        order = torch.argsort((answer == target).long(), stable=True)  # mistakes first
        half = SALIENT // 2
        chosen = list(dict.fromkeys([*order[:half].tolist(), *order.flip(0)[:half].tolist()]))
        batch = self.processor.dataset(split).batch(chosen)
        parameter = next(model.parameters())
        moved = batch.to(parameter.device, parameter.dtype)
        pixels = moved.inputs["pixel_values"].requires_grad_()
        with torch.enable_grad():
            found = self.outputs(model, moved).float()
            index = found.argmax(-1, keepdim=True)
            (slope,) = torch.autograd.grad(found.gather(1, index).sum(), pixels)
        strength = slope.float().abs().amax(1).cpu()
        strength = strength / strength.amax((1, 2), keepdim=True).clamp(min=1e-12)
        images: list[Image] = []
        shown = self._pictures(batch.inputs["pixel_values"])
        for k, i in enumerate(chosen):
            name = self.labels[int(index[k])]
            heat = (255 * strength[k].sqrt()).round().byte().numpy()
            images.append({"png": shown[k], "caption": f"{self.labels[int(target[i])]}"})
            images.append({"png": _base64(heat), "caption": f"what {name} depends on"})
        return {
            "kind": "images",
            "title": "Where it looks",
            "note": "The gradient of the answer's logit by each pixel: bright where it is steep.",
            "images": images,
        }


def _base64(picture: np.ndarray) -> str:
    return base64.b64encode(png(picture, SHOWN)).decode("ascii")
