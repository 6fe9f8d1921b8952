"""Multi-task training of diffusion models at the speed of plain training."""

__version__ = "0.1.0"
