"""Write the weights of a checkpoint, and the description of the network, as safetensors."""

from __future__ import annotations

if __name__ == "__main__":
    from common.startup import end_in_one_line

    end_in_one_line()  # on a signal during the imports below

from training.export import main

if __name__ == "__main__":
    main()
