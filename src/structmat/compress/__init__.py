"""Compressing a pretrained network: calibration, fits in sequence, refinement, and the work list with its cache."""
