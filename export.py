"""Write a checkpoint's weights as safetensors, with their description."""

from __future__ import annotations

from training.export import main

if __name__ == "__main__":
    main()
