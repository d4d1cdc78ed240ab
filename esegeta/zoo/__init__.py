"""A real network with a real head, and small networks with random weights.

>>> from esegeta import zoo
>>> net, x = zoo.brain_extraction_unet(), zoo.head().data
>>> tuple(x.shape)
(1, 128, 128, 128)
"""

from esegeta.zoo.brain import brain_extraction_unet
from esegeta.zoo.classifier import small_classifier
from esegeta.zoo.unet import small_unet
from esegeta.zoo.volumes import Volume, brain_mask, head
from esegeta.zoo.weights import read_safetensors

__all__ = [
    "Volume",
    "brain_extraction_unet",
    "brain_mask",
    "head",
    "read_safetensors",
    "small_classifier",
    "small_unet",
]
