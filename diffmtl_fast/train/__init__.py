"""The bundled trainer: configuration, data, loop, checkpoints, sampling, evaluation, pictures.

It needs the ``train`` extra (diffusers, scikit-learn, matplotlib, ...); the rest of the package does not.
"""
