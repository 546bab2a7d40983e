"""Write the weights of a checkpoint, and the description of the network, as safetensors."""

from __future__ import annotations

from training.export import main

if __name__ == "__main__":
    main()
