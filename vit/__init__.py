"""The science of Patchwork: models, losses, optimizer groups, schedules and weight formats. PyTorch only."""

from configs.model import VitConfig
from vit.model import ViT, build
from vit.weights import load, save

__all__ = ["ViT", "VitConfig", "build", "load", "save"]
