"""The features of FID: Inception v3's last pooling layer, through torch-fidelity or clean-fid.

Weights are never downloaded: they are to lie on disk.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from .._extras import require

FIDELITY_FILE = "weights-inception-2015-12-05-6726825d.pth"
FIDELITY_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{FIDELITY_FILE}"
CLEAN_FILE = "inception-2015-12-05.pt"
CLEAN_URL = f"https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/{CLEAN_FILE}"
SIZE = 299  # of the network's input


class Inception(nn.Module):
    """The network of the original FID in torch-fidelity, which torchmetrics uses too.

    Source: Heusel et al., "GANs Trained by a Two Time-Scale Update Rule", NeurIPS 2017.

    Args:
        weights: file of its weights; by default the one in ``checkpoints`` of the folder of torch.hub.

    Raises:
        FileNotFoundError: there are no weights; the message says where to put them.
        ImportError: torch-fidelity is not installed.
    """

    def __init__(self, weights: str | None = None) -> None:
        super().__init__()
        path = _weights(weights, FIDELITY_FILE, FIDELITY_URL)
        network = require("torch_fidelity.feature_extractor_inceptionv3", "fid").FeatureExtractorInceptionV3
        self._network = network("inception-v3-compat", ["2048"], str(path))

    def forward(self, pictures: Tensor) -> Tensor:
        """Features [N, 2048] of pictures, float32 [N, C, H, W] in [-1, 1] with C of 1 or 3."""
        return self._network(_bytes(pictures))[0]


class CleanInception(nn.Module):
    """The network of clean-fid, for pictures that Pillow's bicubic filter has resized.

    Source: Parmar et al., "On Aliased Resizing and Surprising Subtleties in GAN Evaluation", CVPR 2022.

    Args:
        weights: file of its weights, named ``inception-2015-12-05.pt``; by default the one in ``checkpoints`` of
            the folder of torch.hub.

    Raises:
        FileNotFoundError: there are no weights; the message says where to put them.
        ImportError: clean-fid is not installed.
    """

    def __init__(self, weights: str | None = None) -> None:
        super().__init__()
        path = _weights(weights, CLEAN_FILE, CLEAN_URL)
        module = require("cleanfid.inception_torchscript", "fid")
        self._network = module.InceptionV3W(str(path.parent), download=False)
        self._resize = require("cleanfid.resize", "fid").make_resizer("PIL", False, "bicubic", (SIZE, SIZE))

    def forward(self, pictures: Tensor) -> Tensor:
        """Features [N, 2048] of pictures, float32 [N, C, H, W] in [-1, 1] with C of 1 or 3."""
        arrays = _bytes(pictures).permute(0, 2, 3, 1).cpu().numpy()
        resized = torch.stack([torch.from_numpy(self._resize(array)) for array in arrays])
        return self._network(resized.permute(0, 3, 1, 2).to(pictures.device))


def _weights(chosen: str | None, name: str, url: str) -> Path:
    path = Path(torch.hub.get_dir()) / "checkpoints" / name if chosen is None else Path(chosen)
    if not path.is_file() or (name == CLEAN_FILE and path.name != name):  # clean-fid looks for that name
        raise FileNotFoundError(
            f"expected the weights of Inception v3 in {path}, found none; put {name} there, from {url}, or name "
            "the file by args.weights"
        )
    return path


def _bytes(pictures: Tensor) -> Tensor:
    """Pictures in RGB, uint8."""
    if pictures.shape[1] not in (1, 3):
        raise ValueError(f"expected pictures of 1 or 3 channels, found {pictures.shape[1]}")
    return ((pictures + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1)
