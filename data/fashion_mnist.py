"""Fashion-MNIST (Xiao et al. 2017): the 60,000 training images of garments, in the files and formats of MNIST."""

from __future__ import annotations

from data.mnist import MNIST


class FashionMNIST(MNIST):
    name = "fashion_mnist"
    folders = ("fashion_mnist", "fashion-mnist", "FashionMNIST/raw", "raw")  # the second is that of Debian's package
    random_flip = True


download = FashionMNIST.download
