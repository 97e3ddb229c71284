"""One transformer, three tasks, every scale."""

from unitransformer.torchvision_import import make_torchvision_importable

make_torchvision_importable()
