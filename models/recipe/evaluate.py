"""Measures the exported model on held-out photos and draws the contact sheets.

`python -m recipe.evaluate` writes reports/metrics.json and reports/*.png.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from skimage.metrics import structural_similarity

from recipe import gallery, paths, sheets
from recipe.classifier import load_classifier, look_of
from recipe.gallery import Request
from recipe.generate import defaults, held_out, restyle, roundtrip, square
from recipe.looks import NAMES, render
from recipe.sheets import STRENGTH_LOOKS

STRENGTHS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


def grey(image: np.ndarray) -> np.ndarray:
    return image.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    return float(structural_similarity(grey(a), grey(b), data_range=255))


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(np.float32) - b) ** 2)))


def autoencoder_quality(count: int) -> dict[str, object]:
    images = np.stack(held_out(count))
    values = [psnr(a, b) for a, b in zip(images, roundtrip(images), strict=True)]
    return {"psnr_db_mean": np.mean(values), "psnr_db_min": min(values), "photos": count}


def adherence(wanted: list[Request]) -> dict[str, object]:
    """Measures for every style how often the classifier names it, and how much of the photo is
    kept.
    """
    gallery.make(wanted)
    classifier = load_classifier()
    right, ceiling, asked = Counter(), Counter(), Counter()
    named: Counter[str] = Counter()
    similar: dict[str, list[float]] = {name: [] for name in NAMES}
    for request in wanted:
        image, name = square(request.photo, request.side), request.look
        got = gallery.image(request)
        answer = look_of(classifier, got)
        asked[name] += 1
        right[name] += answer == name
        ceiling[name] += look_of(classifier, render(name, image)) == name
        similar[name].append(ssim(image, got))
        if answer != name:
            named[f"{name} -> {answer}"] += 1
    return {
        "photos": len({request.photo for request in wanted}),
        "images": sum(asked.values()),
        "top1": sum(right.values()) / sum(asked.values()),
        "top1_of_real_renderings": sum(ceiling.values()) / sum(asked.values()),
        "top1_by_look": {name: right[name] / asked[name] for name in NAMES},
        "confusions": dict(named.most_common(12)),
        "ssim_mean": np.mean([np.mean(values) for values in similar.values()]),
        "ssim_by_look": {name: np.mean(values) for name, values in similar.items()},
    }


def strength_response(count: int) -> dict[str, object]:
    """Returns the root mean square distance (0..255) to the init photo by strength."""
    chosen = sheets.look_photos(count)
    table = np.zeros((count, len(STRENGTHS)))
    looks = [STRENGTH_LOOKS[row % len(STRENGTH_LOOKS)] for row in range(count)]
    wanted = [
        [Request(photo, look, seed=1, strength=s, side=256) for s in STRENGTHS]
        for photo, look in zip(chosen, looks, strict=True)
    ]
    gallery.make([request for row in wanted for request in row])
    for row, requests in enumerate(wanted):
        image = square(requests[0].photo, 256).astype(np.float32)
        for column, request in enumerate(requests):
            table[row, column] = np.sqrt(np.mean((gallery.image(request) - image) ** 2))
    return {
        "looks": STRENGTH_LOOKS,
        "side": 256,
        "photos": count,
        "distance_by_strength": dict(zip(map(str, STRENGTHS), table.mean(0), strict=True)),
        "mean_is_monotonic": bool((np.diff(table.mean(0)) > 0).all()),
        "photos_monotonic": int((np.diff(table, axis=1) > 0).all(axis=1).sum()),
    }


def seconds_per_image(sides: tuple[int, ...], repeats: int) -> dict[str, object]:
    """Returns the median seconds of the whole pipeline at the defaults, after one warm-up."""
    out: dict[str, object] = {}
    for side in sides:
        (image,) = held_out(1, side)
        restyle(image, "oil painting")
        spent = []
        for seed in range(repeats):
            start = time.perf_counter()
            restyle(image, "oil painting", seed=seed)
            spent.append(time.perf_counter() - start)
        out[f"{side}x{side}"] = statistics.median(spent)
    return out


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def evaluate(count: int, sparse: int) -> dict[str, object]:
    results: dict[str, object] = {
        "hardware": f"{cpu_name()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "defaults": defaults(),
        "autoencoder": autoencoder_quality(min(10, count)),
        "looks_of_photos_not_on_the_sheet": sparse or len(NAMES),
        "adherence": adherence(sheets.look_requests(sheets.look_photos(count), sparse)),
        "strength": strength_response(min(8, count)),
        "seconds": seconds_per_image((256, 512, 768, 1024), 5),
    }
    paths.REPORTS.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=2, default=float)
    (paths.REPORTS / "metrics.json").write_text(text + "\n")
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photos", type=int, default=20)
    parser.add_argument(
        "--sparse",
        type=int,
        default=4,
        help="number of styles for each photo that is on no sheet; 0: all styles",
    )
    args = parser.parse_args()
    print(json.dumps(evaluate(args.photos, args.sparse), indent=2, default=float))
    sheets.draw()
