"""Measure the speed of networks, sampling and training on this machine."""
