"""Packing: every image of a dataset decoded once, into one array that training reads at the speed of the disk."""
