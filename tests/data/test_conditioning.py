"""Conditions as arguments of a model, and their dropout."""

from __future__ import annotations

import pytest
import torch

from diffmtl_fast.data import Classes, Conditioning, Embeddings, Text

DROPPED = torch.tensor([False, True, False])


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "digit", "zero", "one"]
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def make_encoder(kind):
    """A model of transformers with random weights, and the part of it that reads text."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    bert = transformers.BertConfig(vocab_size=len(WORDS), **SIZES)
    clip = transformers.CLIPTextConfig(vocab_size=len(WORDS), **SIZES)
    t5 = transformers.T5Config(vocab_size=len(WORDS), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    gpt = transformers.GPT2Config(
        vocab_size=len(WORDS), n_embd=16, n_layer=1, n_head=2, bos_token_id=2, eos_token_id=3
    )
    vision = {"image_size": 16, "patch_size": 8, **SIZES}
    whole = transformers.CLIPConfig(text_config=clip.to_dict(), vision_config=vision, projection_dim=16)
    makers = {
        "bert": lambda: transformers.BertModel(bert),
        "bert with a head": lambda: transformers.BertForMaskedLM(bert),
        "clip's text": lambda: transformers.CLIPTextModel(clip),
        "clip": lambda: transformers.CLIPModel(whole),
        "t5's encoder": lambda: transformers.T5EncoderModel(t5),
        "t5": lambda: transformers.T5ForConditionalGeneration(t5),
        "gpt": lambda: transformers.GPT2LMHeadModel(gpt),
        "vit": lambda: transformers.ViTModel(transformers.ViTConfig(**vision)),
    }
    model = makers[kind]()
    parts = {"bert with a head": "bert", "clip": "text_model", "t5": "encoder", "gpt": "transformer"}
    return model, getattr(model, parts[kind]) if kind in parts else model


def save_tiny_encoder(folder, kind="bert"):
    """A text encoder with random weights and its tokenizer; the part that reads text."""
    model, part = make_encoder(kind)
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    pytest.importorskip("transformers").BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    model.save_pretrained(folder)
    return part.eval()


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


KINDS = ["bert", "bert with a head", "clip's text", "clip", "t5's encoder", "t5", "gpt"]


@pytest.mark.parametrize("kind", KINDS)
def test_any_model_that_reads_text(tmp_path, kind):
    part = save_tiny_encoder(tmp_path / "text", kind)
    text = Text(str(tmp_path / "text"), torch.device("cpu"), mask="mask", max_length=5)
    found = text.arguments(["a digit", "one"])
    ids = torch.tensor([[2, 5, 6, 3, 0], [2, 8, 3, 0, 0]])
    with torch.no_grad():
        expected = part(input_ids=ids, attention_mask=(ids > 0).long()).last_hidden_state
    torch.testing.assert_close(found["encoder_hidden_states"], expected)


@pytest.mark.parametrize(("kind", "length"), [("vit", 5), ("clip's text", 100)])
def test_models_that_cannot_read_the_captions_are_refused(tmp_path, kind, length):
    save_tiny_encoder(tmp_path / "text", kind)
    with pytest.raises(ValueError, match=rf"expected a text encoder in .*text that takes {length} tokens"):
        Text(str(tmp_path / "text"), torch.device("cpu"), max_length=length)
