"""Parts of the GPU bench beside the step: JPEGs decoded on the device, and the softmax that the loss has in place."""

from __future__ import annotations

import io
import time
from collections.abc import Sequence

import cv2
import numpy as np
import torch
from PIL import Image


def decode(images: int, pixels: tuple[int, int] = (375, 500)) -> str | None:
    """Images/s of torchvision's batched decoder on the device and of OpenCV on one core of the host, in words; None
    without CUDA."""
    files = [_jpeg(seed, pixels) for seed in range(min(images, 16))]
    files = [files[n % len(files)] for n in range(images)]
    cv2.setNumThreads(0)
    began = time.perf_counter()
    for file in files:
        cv2.imdecode(np.frombuffer(file, np.uint8), cv2.IMREAD_COLOR)
    on_host = images / (time.perf_counter() - began)
    if not torch.cuda.is_available():
        return None
    from torchvision.io import decode_jpeg

    encoded = [torch.frombuffer(bytearray(file), dtype=torch.uint8) for file in files]
    decode_jpeg(encoded, device="cuda")  # makes its decoder
    torch.cuda.synchronize()
    began = time.perf_counter()
    decode_jpeg(encoded, device="cuda")
    torch.cuda.synchronize()
    rate = images / (time.perf_counter() - began)
    return f"{rate:.0f} images/s in batches of {images}; OpenCV on one core {on_host:.0f} ({pixels[1]} x {pixels[0]})"


def _jpeg(seed: int, pixels: tuple[int, int]) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (*pixels, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(cv2.GaussianBlur(noise, (0, 0), 1.5)).save(file, "JPEG", quality=90)
    return file.getvalue()


def softmax_errors(classes: Sequence[int], rows: int = 64) -> str:
    """Largest error of torch's float32 softmax written over its scores, as the loss has it, against float64, in words.

    Scores are spread as those of a trained network: most far below the largest of their row.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    errors = []
    for count in classes:
        scores = 8 * torch.randn(rows, count, generator=torch.Generator().manual_seed(count))
        exact = torch.softmax(scores.double(), 1)
        placed = scores.to(device)
        torch.softmax(placed, 1, out=placed)
        errors.append(f"{count}: {float((placed.cpu().double() - exact).abs().max()):.1e}")
    return f"largest error against float64 by classes, on {device}: {', '.join(errors)}"
