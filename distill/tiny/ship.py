"""Puts a trained model among those that ship with the package, in half precision, with its scores.

    python -m tutelage.distill.tiny.ship RUN_DIR NAME

takes the run's newest checkpoint, and its eval.json if `tutelage eval` has written one.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch

from tutelage.distill.models.loading import TINY, load_model, load_tokenizer
from tutelage.evaluation import files, run_folder


def ship(run: Path, name: str) -> Path:
    """Write distill/tiny/NAME: weights in float16, configuration, tokenizer, scores.json."""
    checkpoint = run_folder.newest(run / run_folder.CHECKPOINTS)
    if checkpoint is None:
        raise ValueError(f"{run} has no checkpoint: train it first")
    folder = TINY / name
    shutil.rmtree(folder, ignore_errors=True)
    model = load_model(str(checkpoint), dtype="float32", device="cpu")
    model.to(torch.float16).save_pretrained(folder)
    load_tokenizer(str(checkpoint)).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    scores = run / run_folder.SCORES
    if scores.is_file():
        found = json.loads(scores.read_text(encoding="utf-8"))
        files.write_json(folder / "scores.json", found["scores"])
    return folder


if __name__ == "__main__":
    print(ship(Path(sys.argv[1]), sys.argv[2]))
