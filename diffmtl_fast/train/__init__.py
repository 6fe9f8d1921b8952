"""The bundled trainer: configuration, loop, checkpoints, logs.

`diffmtl_fast.run` draws from what it has trained, judges and analyses it.

It needs the ``train`` extra (diffusers, scikit-learn, matplotlib, ...); the rest of the package does not.
"""
