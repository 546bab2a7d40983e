"""Packing: decode every image of a dataset once into one array, which training reads at disk speed."""
