"""Conditions as arguments of a model, and their dropout."""

from __future__ import annotations

import pytest
import torch

from diffmtl_fast.data import Classes, Conditioning, Embeddings, Text

DROPPED = torch.tensor([False, True, False])


def save_tiny_encoder(folder):
    """A text encoder with random weights and its tokenizer."""
    transformers = pytest.importorskip("transformers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "digit", "zero", "one"]
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    transformers.BertModel(config).save_pretrained(folder)


def test_classes():
    labels = torch.tensor([2, 0, 1])
    assert Conditioning().arguments(labels) == {}
    assert Classes(3).arguments(labels)["class_labels"] is labels
    assert Classes(3, "y").arguments(labels, DROPPED)["y"].tolist() == [2, 3, 1]


def test_embeddings():
    values = torch.ones(3, 2, 4)
    found = Embeddings().arguments(values, DROPPED)["encoder_hidden_states"]
    assert found.sum((1, 2)).tolist() == [8.0, 0.0, 8.0]


def test_text(tmp_path):
    save_tiny_encoder(tmp_path / "text")
    text = Text(str(tmp_path / "text"), torch.device("cpu"), mask="encoder_attention_mask", max_length=6)
    found = text.arguments(["a digit", "zero", "one"], DROPPED)
    hidden = found["encoder_hidden_states"]
    assert hidden.shape == (3, 6, 16)
    assert found["encoder_attention_mask"].sum(1).tolist() == [4, 2, 3]  # with [CLS] and [SEP]
    empty = text.arguments(["", "one"])["encoder_hidden_states"]
    torch.testing.assert_close(hidden[1], empty[0])
    torch.testing.assert_close(hidden[2], empty[1])
    with pytest.raises(FileNotFoundError, match=r"expected a text encoder .* found no config"):
        Text(str(tmp_path), torch.device("cpu"))
