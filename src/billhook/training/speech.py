"""A LightningDataModule over `datasets` for models that write what is said."""

import wave
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module, util
from io import BytesIO
from typing import Any

import datasets
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoFeatureExtractor, PreTrainedModel, PreTrainedTokenizerBase, SequenceFeatureExtractor

from billhook.arguments import annotated, whole
from billhook.calibration.conversations import check_texts
from billhook.calibration.reading import Data, Rows, Table, check_columns
from billhook.calibration.rows import NOT_LEARNT, Batch
from billhook.model.preprocessors import load_preprocessor
from billhook.training.dataset_module import TokenizedModule

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


class SpeechDataModule(TokenizedModule):
    """Speech with what is said, for models such as Whisper: features of the sound when it is loaded, and tokens to write.

    Args:
        data: A .parquet file or a glob of such, tables (.jsonl, .csv) with paths of sound, a hub name (`"name"` or
            `"name:config"`), or files by split; a folder of sound with a `metadata.jsonl`, which `datasets` reads only where
            torchcodec is installed; in Python also a `Dataset` or `DatasetDict` of `datasets`.
        processor: The name or folder of a feature extractor and a tokenizer; by default those saved with the model in training.
        audio_column: The column of the sound: what `datasets` calls audio, or a path, or `array` and `sampling_rate`. WAV files
            of 8, 16 and 32 bits are read without more, others with soundfile or torchcodec. Channels are averaged.
        text_column: The column of what is said.
        language: The language of a multilingual Whisper, such as "german", in which it then transcribes, too.
        max_length: Longer texts are cut to so many tokens.
        batch_size: Examples in a batch, per device.
        seed: The order of the training examples depends on this seed and the epoch alone.
        num_workers: Processes that load batches; 0 loads in the main process.
        validation: Share of the training rows, in [0, 1), that are held out, drawn by `seed`, to validate on where the data has
            no split `validation`. 0 for none.

    Raises:
        ValueError: If a file is empty or missing, a split has no such column, sound cannot be read, or the model in training
            writes no text of sound.

    Example:
        >>> from billhook.training.speech import SpeechDataModule
        >>> data = SpeechDataModule("speech.parquet", processor="openai/whisper-tiny", language="german")
        >>> data.audio_column, data.text_column
        ('audio', 'text')
    """

    def __init__(
        self,
        data: Data | Table,
        processor: str | None = None,
        audio_column: str = "audio",
        text_column: str = "text",
        language: str | None = None,
        max_length: int = 128,
        batch_size: int = 8,
        seed: int = 0,
        num_workers: int = 0,
        validation: float = 0.05,
    ) -> None:
        annotated(SpeechDataModule, locals())
        super().__init__(data, batch_size, seed, num_workers, validation=validation)
        whole("max_length", max_length)
        self.tokenizer_name, self.audio_column, self.text_column = processor, audio_column, text_column
        self.language, self.max_length = language, max_length
        self._extractor: SequenceFeatureExtractor | None = None
        self._begins: int | None = None

    @property
    def feature_extractor(self) -> SequenceFeatureExtractor:
        """The feature extractor, loaded when first asked for."""
        if self._extractor is None:
            name = self.tokenizer_name or self.name_of_model("processor")
            loaded = load_preprocessor(name, AutoFeatureExtractor)
            if not isinstance(loaded, SequenceFeatureExtractor):
                raise ValueError(f"processor={name!r}: a {type(loaded).__name__} makes no features of sound")
            self._extractor = loaded
        return self._extractor

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, loaded when first asked for; one of several languages begins a text with its own."""
        first = self._tokenizer is None
        tokenizer = super().tokenizer
        if first and self.language is not None:
            set_prefix = getattr(tokenizer, "set_prefix_tokens", None)
            if set_prefix is None:
                raise ValueError(f"language={self.language!r}: a {type(tokenizer).__name__} knows no languages")
            set_prefix(language=self.language, task="transcribe")
        return tokenizer

    def check(self, model: PreTrainedModel) -> None:
        """Refuses a model that does not write text of sound."""
        if not model.config.is_encoder_decoder or model.main_input_name not in ("input_features", "input_values"):
            raise ValueError(
                f"SpeechDataModule: a {type(model).__name__} does not write what it hears: train a model such as Whisper "
                "(task='speech-seq2seq')"
            )

    def read(self, model: PreTrainedModel | None = None) -> None:
        """Makes the splits; a model learns which language it transcribes."""
        try:
            super().read(model)
        except datasets.exceptions.DatasetGenerationError as error:
            if "torchcodec" not in str(error.__cause__):
                raise
            raise ValueError(
                f"data={self.data!r} is a folder of sound, which `datasets` reads with torchcodec alone: pip install torchcodec, "
                "or give a table (.parquet, .jsonl) with a column of sound or its paths"
            ) from error
        if model is not None:
            self._begins = model.config.decoder_start_token_id
            if self.language is not None:
                speaks: Any = model.generation_config
                speaks.language, speaks.task = self.language, "transcribe"

    def encode(self, rows: Rows, split: str) -> Rows:
        """Returns rows of sound and text that become features and tokens when they are read."""
        check_columns(rows, split, self.audio_column, self.text_column)
        if not isinstance(rows, datasets.Dataset):
            raise ValueError("data: sound is not read from a stream: give files or a Dataset")
        spoken = rows.select_columns([self.audio_column, self.text_column])
        if isinstance(spoken.features[self.audio_column], datasets.Audio):
            spoken = spoken.cast_column(self.audio_column, datasets.Audio(decode=False))
        columns = self.audio_column, self.text_column
        return spoken.with_transform(Heard(self.feature_extractor, self.tokenizer, *columns, self.max_length))

    def collate(self) -> Callable[[list[Batch]], Batch]:
        """Returns the function that makes a batch of examples, padded to the longest; padding does not count in the loss."""
        return Spoken(self.feature_extractor, self._begins)


@dataclass(frozen=True)
class Heard:
    """Makes features of sound and tokens of text of rows that are read."""

    extractor: Any
    tokenizer: PreTrainedTokenizerBase
    audio_column: str
    text_column: str
    max_length: int

    def __call__(self, rows: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        """Returns what the feature extractor makes of each row, and `labels`."""
        check_texts(list(rows[self.text_column]), self.text_column)
        rate = int(self.extractor.sampling_rate)
        made = [self.extractor(heard(value, rate), sampling_rate=rate) for value in rows[self.audio_column]]
        labels = self.tokenizer(list(rows[self.text_column]), truncation=True, max_length=self.max_length)["input_ids"]
        return {name: [one[name][0] for one in made] for name in made[0]} | {"labels": labels}


@dataclass(frozen=True)
class Spoken:
    """Makes a batch of examples.

    Args:
        extractor: It pads features.
        begins: The token that the model itself puts before labels, which then do not begin with it.
    """

    extractor: SequenceFeatureExtractor
    begins: int | None

    def __call__(self, examples: list[Batch]) -> Batch:
        """Returns features and `labels`."""
        features = [{name: value for name, value in one.items() if name != "labels"} for one in examples]
        labels = [one["labels"][one["labels"][:1] == [self.begins] :] for one in examples]
        batch = dict(self.extractor.pad(features, return_tensors="pt"))
        padded = pad_sequence([torch.tensor(own) for own in labels], batch_first=True, padding_value=NOT_LEARNT)
        return batch | {"labels": padded}
