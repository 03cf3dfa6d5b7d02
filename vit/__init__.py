"""The science of Patchwork: models, losses, optimizer groups, schedules and weight formats. PyTorch only."""

from configs.model import BitConfig, VitConfig
from vit.bit import BiT
from vit.model import Network, ViT, build
from vit.weights import load, save

__all__ = ["BiT", "BitConfig", "Network", "ViT", "VitConfig", "build", "load", "save"]
