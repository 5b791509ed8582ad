"""Compressing a pretrained network: calibration, fits in sequence, refinement, and the work list with its cache."""

from structmat._ranks import together
from structmat.compress.api import compress_
from structmat.compress.calibration import Calibration, calibrate
from structmat.compress.refinement import Refinement
from structmat.compress.tasks import MethodChoice

__all__ = ["Calibration", "MethodChoice", "Refinement", "calibrate", "compress_", "together"]
