"""Decode a dataset once, into one array that training reads at the speed of the disk."""

from __future__ import annotations

from data.pack import main

if __name__ == "__main__":
    main()
