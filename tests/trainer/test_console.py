from __future__ import annotations

from gradsmith.blocks import Metric
from gradsmith.console import TrainingProgress

METRICS = (Metric("loss", "Loss"), Metric("f1", "F1", "", True, ".1%"), Metric("hue", "Hue error"))


def test_progress_is_told_in_the_tasks_words(capsys):
    with TrainingProgress("run", 20, metrics=METRICS, unit="images") as bar:
        bar.update(10, {"kind": "train", "loss": 0.5, "images_per_second": 1234.5})
        row = {"kind": "validation", "loss": 0.25, "f1": 0.875, "hue": None}
        bar.update(10, row)
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("run: step 10/20  loss 0.5000  1,234 images/s")
    assert said[1] == "run: step 10/20  validation loss 0.2500, F1 87.5%"
