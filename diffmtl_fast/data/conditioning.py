"""From what a batch is conditioned on to arguments of the model, with dropout for classifier-free guidance."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._extras import require
from .._host import upload
from .items import Conditions


class Conditioning:
    """No conditioning; the base of those that are one.

    Classifier-free guidance (Ho & Salimans, 2022, arXiv 2207.12598) wants a model that was trained without its
    condition, too: in training every sample loses it with a probability.
    """

    def arguments(self, values: Conditions, dropped: Tensor | None = None) -> dict[str, Any]:
        """Keyword arguments of the model.

        Args:
            values: of the samples; see `Conditions`.
            dropped: bool [B] on the host, the samples that lose their condition; None for none.
        """
        return {}


class Classes(Conditioning):
    """Classes as integers; a sample without one has class C.

    Args:
        num_classes: C; the model needs C + 1 embeddings where conditions are dropped.
        argument: of the model.
    """

    def __init__(self, num_classes: int, argument: str = "class_labels") -> None:
        self.num_classes, self.argument = num_classes, argument

    def arguments(self, values: Conditions, dropped: Tensor | None = None) -> dict[str, Any]:
        """The classes int64 [B]."""
        assert isinstance(values, Tensor)
        if dropped is not None:
            values = values.masked_fill(upload(dropped, values.device), self.num_classes)
        return {self.argument: values}


class Embeddings(Conditioning):
    """Embeddings computed beforehand, [B, L, D]; zeros for a sample without one.

    Args:
        argument: of the model.
    """

    def __init__(self, argument: str = "encoder_hidden_states") -> None:
        self.argument = argument

    def arguments(self, values: Conditions, dropped: Tensor | None = None) -> dict[str, Any]:
        """The embeddings."""
        assert isinstance(values, Tensor)
        if dropped is not None:
            values = values.masked_fill(
                upload(dropped, values.device).view(-1, *[1] * (values.dim() - 1)), 0.0
            )
        return {self.argument: values}


class Text(Conditioning):
    """Captions, through a text encoder of transformers that is not trained; "" for a sample without one.

    Of models that are more than that, such as CLIP, a whole T5 or a language model with its head, the part that
    reads text is used.

    Args:
        folder: what the encoder's and the tokenizer's ``save_pretrained`` wrote, together or, as pipelines of
            diffusers do, in ``text_encoder`` and ``tokenizer`` of the folder.
        device: where it runs.
        argument: of the model, for the last hidden states [B, L, D].
        mask: argument of the model for the mask of tokens [B, L]; None for none.
        max_length: L.

    Raises:
        FileNotFoundError: the folder holds none.
        ImportError: transformers is not installed.
        ValueError: the model gives no hidden states of text, or does not fit the tokenizer or `max_length`.
    """

    def __init__(
        self,
        folder: str,
        device: torch.device,
        argument: str = "encoder_hidden_states",
        mask: str | None = None,
        max_length: int = 77,
    ) -> None:
        transformers = require("transformers", "text")
        encoder, tokenizer = (
            path if (path := Path(folder) / name).is_dir() else Path(folder)
            for name in ("text_encoder", "tokenizer")
        )
        if not (encoder / "config.json").is_file():
            raise FileNotFoundError(
                f"expected a text encoder and its tokenizer, found no config.json in {encoder}"
            )
        names = transformers.AutoConfig.from_pretrained(encoder, local_files_only=True).architectures
        kind = getattr(transformers, names[0]) if names else transformers.AutoModel
        model = _reads_text(kind.from_pretrained(encoder, local_files_only=True))
        self._encoder = model.requires_grad_(False).eval().to(device)
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
        self.argument, self.mask, self.max_length = argument, mask, max_length
        try:
            self.arguments([""])
        except Exception as error:
            raise ValueError(
                f"expected a text encoder in {encoder} that takes {max_length} tokens of its tokenizer, found "
                f"{type(model).__name__}, which fails ({error})"
            ) from error

    @torch.no_grad()
    def arguments(self, values: Conditions, dropped: Tensor | None = None) -> dict[str, Any]:
        """The encoded captions."""
        assert isinstance(values, list)
        if dropped is not None:
            values = ["" if gone else text for text, gone in zip(values, dropped.tolist(), strict=True)]
        tokens = self._tokenizer(
            values, padding="max_length", max_length=self.max_length, truncation=True, return_tensors="pt"
        )
        ids, mask = (upload(tokens[name], self._encoder.device) for name in ("input_ids", "attention_mask"))
        hidden = self._encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return {self.argument: hidden} | ({self.mask: mask} if self.mask else {})


def _reads_text(model: Any) -> Any:
    """The part of a model of transformers that makes hidden states [B, L, D] of tokens."""
    if model.config.is_encoder_decoder:
        return model.get_encoder()
    base = model.base_model  # without a head
    return getattr(base, "text_model", base)


def times_keyword(model: Any) -> str | None:
    """The name of the time's argument where it need not be the second one; None for the second one."""
    parameters = inspect.signature(getattr(model, "forward", model)).parameters
    return "timestep" if "timestep" in parameters else None
