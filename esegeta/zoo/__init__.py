"""A real network with a real head, networks trained on drawn vessels and tumours, networks with random weights.

>>> from esegeta import zoo
>>> net, x = zoo.brain_extraction_unet(), zoo.head().data
>>> tuple(x.shape)
(1, 128, 128, 128)
"""

from esegeta.zoo.brain import brain_extraction_unet
from esegeta.zoo.classifier import small_classifier
from esegeta.zoo.phantoms import Phantom, vessel_phantom
from esegeta.zoo.tumour_networks import tumour_dense_unet, tumour_plain, tumour_residual_unet
from esegeta.zoo.tumours import TumourSlice, tumour_slice
from esegeta.zoo.unet import small_unet
from esegeta.zoo.vessels import vessel_unet, vessel_unet_mss, vessel_unet_mss_deformation
from esegeta.zoo.volumes import Volume, brain_mask, head
from esegeta.zoo.weights import read_safetensors

__all__ = [
    "Phantom",
    "TumourSlice",
    "Volume",
    "brain_extraction_unet",
    "brain_mask",
    "head",
    "read_safetensors",
    "small_classifier",
    "small_unet",
    "tumour_dense_unet",
    "tumour_plain",
    "tumour_residual_unet",
    "tumour_slice",
    "vessel_phantom",
    "vessel_unet",
    "vessel_unet_mss",
    "vessel_unet_mss_deformation",
]
