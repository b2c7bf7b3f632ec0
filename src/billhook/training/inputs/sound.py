"""Sound as numbers, from what a row holds: an array, or a file, which is read with what is installed."""

import wave
from collections.abc import Mapping
from importlib import import_module, util
from io import BytesIO
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Samples = NDArray[np.float32]
WIDTHS = {1: "u1", 2: "<i2", 4: "<i4"}
"""How WAV files hold whole numbers of so many bytes."""


def heard(value: Any, rate: int) -> Samples:  # noqa: ANN401 - whatever stands in a table
    """Returns sound in one channel, at so many samples a second.

    Args:
        value: A path; or a mapping with `array`, `[samples]`, and `sampling_rate`; or with the `bytes` of a file, or its `path`.
        rate: Samples a second.

    Returns:
        Float32, `[samples]`, in [-1, 1].

    Raises:
        ValueError: If it is no sound, or nothing that is installed reads it.
    """
    if isinstance(value, Mapping) and value.get("array") is not None and value.get("sampling_rate"):
        samples, own = torch.as_tensor(np.asarray(value["array"], dtype=np.float32)), int(value["sampling_rate"])
    else:
        held: Any = {"path": value} if isinstance(value, str) else value
        if not isinstance(held, Mapping) or (held.get("bytes") is None and not held.get("path")):
            raise ValueError(f"a {type(value).__name__} is no sound: a path, `bytes`, or `array` and `sampling_rate` are needed")
        samples, own = _read(held.get("bytes"), held.get("path") or "a row")
    if samples.dim() != 1 or not len(samples):
        raise ValueError(f"sound of the shape {list(samples.shape)} is no row of samples")
    found: Samples = resampled(samples, own, rate).numpy()
    return found


def _read(data: bytes | None, name: str) -> tuple[Tensor, int]:
    """Reads a file by Python's own `wave`, or soundfile, or torchcodec; returns the mean of its channels, and its rate."""
    source: Any = name if data is None else BytesIO(data)
    try:
        with wave.open(source, "rb") as file:
            width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
            frames = np.frombuffer(file.readframes(file.getnframes()), dtype=WIDTHS[width])
        whole = frames.astype(np.float32) / 2.0 ** (8 * width - 1) - (1.0 if width == 1 else 0.0)
        return torch.from_numpy(whole.reshape(-1, channels).mean(1)), rate
    except (wave.Error, EOFError, KeyError):  # it is of another format
        pass
    except OSError as error:
        raise ValueError(f"the sound '{name}' cannot be read: {error}") from error
    source = name if data is None else BytesIO(data)
    try:
        if util.find_spec("soundfile") is not None:
            samples, rate = import_module("soundfile").read(source, dtype="float32", always_2d=True)
            return torch.from_numpy(samples.mean(1)), int(rate)
        if util.find_spec("torchcodec") is not None:
            decoded = import_module("torchcodec.decoders").AudioDecoder(data or name).get_all_samples()
            return decoded.data.float().mean(0), int(decoded.sample_rate)
    except Exception as error:  # both raise all kinds
        raise ValueError(f"the sound '{name}' cannot be read: {error}") from error
    raise ValueError(f"'{name}' is no WAV file of 8, 16 or 32 bits, which are read without more: pip install soundfile")


def resampled(samples: Tensor, own: int, rate: int) -> Tensor:
    """Returns samples at another rate, with the frequencies that both rates have, by their Fourier transform.

    >>> time = torch.arange(100) / 100
    >>> torch.allclose(resampled(torch.sin(6.28318 * 3 * time), 100, 50), torch.sin(6.28318 * 3 * time[::2]), atol=1e-3)
    True
    """
    if own == rate:
        return samples
    count = max(1, round(len(samples) * rate / own))
    spectrum = torch.fft.rfft(samples.double())
    found: Tensor = torch.fft.irfft(spectrum, n=count) * (count / len(samples))
    return found.float()
