"""Tests, in folders like those of the packages; `stress/` has scripts to run by hand."""
