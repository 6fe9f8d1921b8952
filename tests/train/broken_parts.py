"""Components that fail, each in its own way; the campaign names them by import path."""

from __future__ import annotations

import functools
import pathlib
import threading

import torch
from torch import nn

from diffmtl_fast.data import FileData, ImageData, digits

ERRORS = [
    RuntimeError, KeyError, IndexError, ImportError, FileNotFoundError, OSError, AssertionError, MemoryError,
    ZeroDivisionError, AttributeError, ValueError, StopIteration, SystemExit,
]  # fmt: skip


def data(kind="", error=0):
    if kind == "raise":
        raise ERRORS[error]("as asked")
    found = digits()
    train, labels = found.train[:60].clone(), found.train_labels[:60].clone()
    test, test_labels = found.test[:20], found.test_labels[:20]
    if kind in ("none", "tuple", "dict", "tensor"):
        return {"none": None, "tuple": (train, labels), "dict": {"train": train}, "tensor": train}[kind]
    if kind == "labels":
        labels[3] = 50
    if kind == "negative label":
        labels[3] = -1
    if kind == "float labels":
        labels = labels.float()
    if kind == "test shape":
        test = test[..., :4]
    if kind == "bytes":
        train = train * 127.5 + 127.5
    if kind == "uint8":
        train = (train * 127.5 + 127.5).to(torch.uint8)
    if kind == "constant":
        train = torch.full_like(train, 3.0)
    if kind == "nan":
        train[5, 0, 2, 2] = float("nan")
    if kind == "no images":
        train, labels = train[:0], labels[:0]
    if kind == "flat":
        train = train.flatten(1)
    if kind == "absent":
        labels[labels == 4] = 5
    return ImageData(train, labels, test, test_labels)


class Items:
    """Sixty digits by index, with something wrong from the tenth on, which construction does not look at."""

    def __init__(self, kind="", error=0):
        self.kind, self.error, self.found = kind, error, digits()

    def __len__(self):
        sizes = {"empty": 0, "negative": -3, "longer than it is": 90, "float length": 60.0}
        if self.kind == "length raises":
            raise ERRORS[self.error]("as asked")
        return sizes.get(self.kind, 60)

    def item(self, index, source):
        if index >= 60:
            raise IndexError("as asked")
        image, label = self.found.train[index], int(self.found.train_labels[index])
        late = index >= 10
        if late and self.kind == "raise":
            raise ERRORS[self.error]("as asked")
        if late and self.kind == "none":
            return None
        if late and self.kind == "alone":
            return image
        wrong = {
            "nan": image * float("nan"), "other shape": image[..., :4],
            "text": "an image", "integers": (image * 127).int(), "double": image.double(),
        }  # fmt: skip
        if late and self.kind in wrong:
            return wrong[self.kind], label
        conditions = {
            "label out of range": 50,
            "negative label": -1,
            "label of another type": "five",
            "float": 0.5,
        }
        return image, conditions.get(self.kind, label) if late else label

    def name(self, index):
        if self.kind == "name raises" and index >= 10:
            raise ERRORS[self.error]("as asked")
        return f"digit {index}"


def files(kind="", error=0, classes=10):
    return FileData(Items(kind, error), None, classes)


class Model(nn.Module):
    def __init__(self, kind="", error=0, after=0, classes=10):
        if kind == "no super":
            self.layer = nn.Linear(64, 64)
        super().__init__()
        if kind == "construct":
            raise ERRORS[error]("as asked")
        self.kind, self.error, self.after, self.calls = kind, error, after, 0
        self.layer, self.time, self.label = nn.Linear(64, 64), nn.Embedding(20, 64), nn.Embedding(classes, 64)
        if kind == "frozen":
            self.requires_grad_(False)
        if kind == "meta":
            self.to("meta")
        if kind == "nan weights":
            nn.init.constant_(self.layer.weight, float("nan"))
        if kind == "not copied":
            self.lock = threading.Lock()

    def forward(self, x, t, class_labels=None):
        self.calls += 1
        if self.kind == "call" and self.calls > self.after:
            raise ERRORS[self.error]("as asked")
        out = self.layer(x.flatten(1) + self.time(t) + self.label(class_labels)).view(x.shape)
        returned = {
            "none": None, "dict": {"a": out}, "dict of sample": {"sample": out}, "int": 3, "tuple": (out,),
            "list": [out], "detached": out.detach(), "shape": out[:, :, :4], "row": out[:1], "input": x,
            "complex": out.to(torch.complex64), "integers": out.int(), "nan": out * float("nan"),
            "mean": out.mean(),
        }  # fmt: skip
        late = {"late none": None, "late shape": out[..., :4], "late rows": out[1:], "late type": out.int()}
        if self.kind in late and self.calls > self.after:
            return late[self.kind]
        return returned.get(self.kind, out)

    def train(self, mode=True):
        if self.kind == "mode" and self.calls > self.after:
            raise ERRORS[self.error]("as asked")
        return super().train(mode)

    def state_dict(self, *args, **kwargs):
        if self.kind == "state":
            raise ERRORS[self.error]("as asked")
        return super().state_dict(*args, **kwargs)

    def save_pretrained(self, path):
        if self.kind == "save":
            raise RuntimeError("as asked")
        if self.kind == "saves nothing":
            return
        path = pathlib.Path(path)
        path.mkdir()
        torch.save(super().state_dict(), path / "weights.pt")


class Config(dict):
    __getattr__ = dict.get


class Schedule:
    """What the noise process is read from, as far as the trainer looks at it."""

    def __init__(self, kind=""):
        self.kind = kind
        self.config = None if kind == "no config" else Config(num_train_timesteps=20)
        if kind == "no number":
            self.config = Config()
        if kind == "number of another type":
            self.config = Config(num_train_timesteps="20")
        signal = torch.linspace(0.99, 0.01, 20)
        self.alphas_cumprod = {
            "none": None, "empty": signal[:0], "matrix": signal.view(4, 5), "short": signal[:7], "text": "abc",
            "nan": signal * float("nan"), "above one": signal * 3, "negative": -signal,
        }.get(kind, signal)  # fmt: skip


@functools.cache
def _ddim():
    from diffusers import DDIMScheduler

    return DDIMScheduler


class _Sampler:
    """A DDIM whose one method fails; chosen by the name of the subclass."""

    kind = ""

    @classmethod
    def from_config(cls, config, error=0, **options):
        made = _ddim().from_config(config, **options)
        wrong = {
            "raises": lambda *args, **kwargs: _raise(error),
            "none": lambda *args, **kwargs: None,
            "nan": lambda out, t, x, **kwargs: type("Step", (), {"prev_sample": x * float("nan")}),
            "shape": lambda out, t, x, **kwargs: type("Step", (), {"prev_sample": x[..., :4]}),
            "tuple": lambda out, t, x, **kwargs: (x,),
        }
        if cls.kind in wrong:
            made.step = wrong[cls.kind]
        if cls.kind == "no timesteps":
            made.set_timesteps = lambda steps: setattr(made, "timesteps", torch.empty(0, dtype=torch.int64))
        if cls.kind == "set raises":
            made.set_timesteps = lambda steps: _raise(error)
        if cls.kind == "scale raises":
            made.scale_model_input = lambda *args: _raise(error)
        if cls.kind == "timesteps none":
            made.set_timesteps = lambda steps: setattr(made, "timesteps", None)
        if cls.kind == "beyond":
            made.set_timesteps = lambda steps: setattr(made, "timesteps", torch.tensor([25, 3]))
        return None if cls.kind == "nothing" else made


def _raise(error):
    raise ERRORS[error]("as asked")


SAMPLERS = {
    f"Sampler{i}": kind
    for i, kind in enumerate(
        ["raises", "none", "nan", "shape", "tuple", "no timesteps", "set raises", "scale raises", "timesteps none",
         "beyond", "nothing"]
    )
}  # fmt: skip
globals().update({name: type(name, (_Sampler,), {"kind": kind}) for name, kind in SAMPLERS.items()})
