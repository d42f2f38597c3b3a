"""VGG16 (Simonyan and Zisserman, 2015) for small images, as in the tutorials."""

from torch import nn

from cifar_dist.models.layers import AveragePool, convolution, half_size

STAGES = [(96, 96), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)]


def vgg16(num_classes: int, dropout: float = 0.5) -> nn.Module:
    """Build 13 3x3 convolutions with BatchNorm and ReLU, and a head 512-4096-4096-classes."""
    layers: list[nn.Module] = []
    inputs = 3
    for stage in STAGES:
        for outputs in stage:
            layers += [convolution(inputs, outputs, 3), nn.ReLU(inplace=True)]
            inputs = outputs
        layers += [half_size()]
    layers += [AveragePool(1), nn.Flatten()]  # pooling is the identity for 32x32 images
    for width in (512, 4096):
        layers += [nn.Linear(width, 4096), nn.ReLU(inplace=True), nn.Dropout(dropout)]
    return nn.Sequential(*layers, nn.Linear(4096, num_classes))
