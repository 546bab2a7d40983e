"""The networks, and reading their weights."""

from models.dit import DiT
from models.early_exit import EarlyExitUViT
from models.uvit import UViT
from models.weights import load_weights

__all__ = ["DiT", "EarlyExitUViT", "UViT", "load_weights"]
