"""How good a network is, and how many operations it takes."""

from structmat.evaluate.classification import Accuracy, accuracy
from structmat.evaluate.flops import Flops, relative_flops
from structmat.evaluate.language import Perplexity, perplexity

__all__ = ["Accuracy", "Flops", "Perplexity", "accuracy", "perplexity", "relative_flops"]
