"""The SLSNet network: layers, training, evaluation and export.

Importing the package itself imports no torch, nor do `photos.image` and `model.metrics`.
"""
