"""What a network weighs and costs, known without torch: a plan is made where nothing is installed.

Each architecture is written down once more, as layers that know their shapes only; a test compares
every name, shape and operation with those of the real network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from cifar_dist.config import ModelConfig


@dataclass
class Features:
    """What flows between layers, for one image.

    Attributes:
        channels, side: of [channels, side, side].
        kept: it is among what the backward pass needs, and counted.
    """

    channels: int
    side: int
    kept: bool = False

    @property
    def size(self) -> int:
        """How many numbers it has."""
        return self.channels * self.side**2


@dataclass
class Tape:
    """What a forward pass of one image adds up to.

    Attributes:
        multiplications: of convolutions and linear layers, each with its addition.
        kept_bytes: what float32 activations the backward pass needs.
    """

    multiplications: int = 0
    kept_bytes: int = 0

    def keep(self, features: Features) -> None:
        """Note that the backward pass needs `features`; several layers may share them."""
        if not features.kept:
            self.kept_bytes += 4 * features.size
            features.kept = True


@dataclass(frozen=True)
class Weight:
    """A tensor of a network's state: its name, its shape, and whether an optimizer trains it."""

    name: str
    shape: tuple[int, ...]
    trained: bool = True

    @property
    def count(self) -> int:
        """How many numbers it holds."""
        product = 1
        for length in self.shape:
            product *= length
        return product

    @property
    def bytes(self) -> int:
        """Its size; all are float32 but BatchNorm's counters, which are int64."""
        return 8 if self.name.endswith("num_batches_tracked") else 4 * self.count

    @property
    def statistics(self) -> bool:
        """Whether it belongs to BatchNorm's running statistics."""
        return self.name.endswith(("running_mean", "running_var"))


class Layer:
    """A layer without weights that leaves the shape alone."""

    def weights(self, prefix: str) -> Iterator[Weight]:
        """Yield what it holds, named as torch would."""
        yield from ()

    def forward(self, features: Features, tape: Tape) -> Features:
        """Return what comes out, and note on the tape what that costs."""
        return features


@dataclass
class Conv(Layer):
    """Convolution; padded to keep the size at stride 1, unless it is a whitening layer."""

    inputs: int
    outputs: int
    size: int
    stride: int = 1
    bias: bool = False
    trained: bool = True

    def weights(self, prefix: str) -> Iterator[Weight]:
        shape = (self.outputs, self.inputs, self.size, self.size)
        yield Weight(f"{prefix}weight", shape, self.trained)
        if self.bias:
            yield Weight(f"{prefix}bias", (self.outputs,), self.trained)

    def forward(self, features: Features, tape: Tape) -> Features:
        if self.trained:
            tape.keep(features)
        padding = self.size // 2 if self.size % 2 else 0
        side = (features.side + 2 * padding - self.size) // self.stride + 1
        tape.multiplications += self.outputs * self.inputs * self.size**2 * side**2
        return Features(self.outputs, side)


@dataclass
class Norm(Layer):
    """BatchNorm."""

    channels: int
    scaled: bool = True

    def weights(self, prefix: str) -> Iterator[Weight]:
        yield Weight(f"{prefix}weight", (self.channels,), self.scaled)
        yield Weight(f"{prefix}bias", (self.channels,))
        for name in ("running_mean", "running_var"):
            yield Weight(f"{prefix}{name}", (self.channels,), False)
        yield Weight(f"{prefix}num_batches_tracked", (), False)

    def forward(self, features: Features, tape: Tape) -> Features:
        tape.keep(features)
        return Features(features.channels, features.side)


class Relu(Layer):
    """In place: what it keeps is what comes out."""

    def forward(self, features: Features, tape: Tape) -> Features:
        tape.keep(features)
        return features


class Gelu(Layer):
    """Keeps what goes in."""

    def forward(self, features: Features, tape: Tape) -> Features:
        tape.keep(features)
        return Features(features.channels, features.side)


class Halve(Layer):
    """2x2 max pooling, with a last row of its own if the size is odd."""

    def forward(self, features: Features, tape: Tape) -> Features:
        tape.keep(features)
        pooled = Features(features.channels, (features.side + 1) // 2)
        tape.kept_bytes += 8 * pooled.size  # where each maximum was, int64
        return pooled


class Shrink(Layer):
    """2x2 max pooling that drops an odd row, and leaves a single pixel alone."""

    def forward(self, features: Features, tape: Tape) -> Features:
        if features.side == 1:
            return features
        tape.keep(features)
        pooled = Features(features.channels, features.side // 2)
        tape.kept_bytes += 8 * pooled.size
        return pooled


class GlobalMax(Layer):
    """Max pooling to a single pixel."""

    def forward(self, features: Features, tape: Tape) -> Features:
        tape.keep(features)
        tape.kept_bytes += 8 * features.channels
        return Features(features.channels, 1)


@dataclass
class Average(Layer):
    """Average pooling to a fixed side."""

    side: int

    def forward(self, features: Features, tape: Tape) -> Features:
        if features.side == self.side:
            return features
        tape.keep(features)
        return Features(features.channels, self.side)


class Flatten(Layer):
    """One row of numbers; the same memory."""

    def forward(self, features: Features, tape: Tape) -> Features:
        return Features(features.size, 1, features.kept)


@dataclass
class Dropout(Layer):
    """Keeps a mask of floats, where it drops anything."""

    share: float

    def forward(self, features: Features, tape: Tape) -> Features:
        if not self.share:
            return features
        tape.kept_bytes += 4 * features.size
        return Features(features.channels, features.side)


@dataclass
class Linear(Layer):
    """A linear layer."""

    inputs: int
    outputs: int
    bias: bool = True

    def weights(self, prefix: str) -> Iterator[Weight]:
        yield Weight(f"{prefix}weight", (self.outputs, self.inputs))
        if self.bias:
            yield Weight(f"{prefix}bias", (self.outputs,))

    def forward(self, features: Features, tape: Tape) -> Features:
        tape.keep(features)
        tape.multiplications += self.inputs * self.outputs
        return Features(self.outputs, 1)


class Chain(Layer):
    """Layers one after another, named by position or by name."""

    def __init__(self, *layers: Layer, **named: Layer) -> None:
        self.parts = {str(number): layer for number, layer in enumerate(layers)} | named

    def weights(self, prefix: str = "") -> Iterator[Weight]:
        for name, part in self.parts.items():
            yield from part.weights(f"{prefix}{name}.")

    def forward(self, features: Features, tape: Tape) -> Features:
        for part in self.parts.values():
            features = part.forward(features, tape)
        return features


class Residual(Chain):
    """A body and a shortcut added up, then one more layer."""

    def forward(self, features: Features, tape: Tape) -> Features:
        body, shortcut, finish = self.parts.values()
        added = body.forward(features, tape)
        shortcut.forward(features, tape)
        return finish.forward(Features(added.channels, added.side), tape)


class Bridge(Chain):
    """Layers one after another, added to what went in."""

    def forward(self, features: Features, tape: Tape) -> Features:
        added = super().forward(features, tape)
        return Features(added.channels, added.side)


def _convolution(inputs: int, outputs: int, size: int, stride: int = 1) -> Chain:
    return Chain(Conv(inputs, outputs, size, stride), Norm(outputs))


def _linear_head(classes: int, dropout: float) -> Chain:
    linear = [Linear(2048, 256), Relu(), Linear(256, 64), Relu(), Linear(64, classes)]
    return Chain(Average(2), Flatten(), Dropout(dropout), *linear)


def _tutorial(hidden: Sequence[int], activated: bool) -> Callable[..., Chain]:
    def build(classes: int, dropout: float = 0.25 if activated else 0.0) -> Chain:
        layers: list[Layer] = []
        for inputs, outputs in pairwise([3, 32, 32, 64]):
            layers += [Conv(inputs, outputs, 5, bias=True), *[Relu()] * activated, Halve()]
        layers += [Average(4), Flatten()]
        for inputs, outputs in pairwise([1024, *hidden]):
            layers += [Linear(inputs, outputs), *[Relu()] * activated]
            layers += [Dropout(dropout)] if dropout else []
        return Chain(*layers, Linear(hidden[-1], classes))

    return build


def _deep(classes: int, dropout: float = 0.0) -> Chain:
    layers: list[Layer] = []
    for inputs, outputs in pairwise([3, 64, 128, 256, 512]):
        layers += [_convolution(inputs, outputs, 3), _convolution(outputs, outputs, 3)]
        layers += [Relu(), Halve()]
    return Chain(*layers, _linear_head(classes, dropout))


def _residual(classes: int, dropout: float = 0.4) -> Chain:
    def block(inputs: int, outputs: int) -> Chain:
        body = Chain(_convolution(inputs, outputs, 3), Relu(), _convolution(outputs, outputs, 3))
        shortcut = _convolution(inputs, outputs, 1)
        return Residual(body=body, shortcut=shortcut, finish=Chain(Relu(), Halve()))

    blocks = [block(inputs, outputs) for inputs, outputs in pairwise([3, 64, 128, 256, 512])]
    return Chain(*blocks, _linear_head(classes, dropout))


def _vgg16(classes: int, dropout: float = 0.5) -> Chain:
    layers: list[Layer] = []
    inputs = 3
    for width, depth in ((96, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(depth):
            layers += [_convolution(inputs, width, 3), Relu()]
            inputs = width
        layers += [Halve()]
    layers += [Average(1), Flatten()]
    for width in (512, 4096):
        layers += [Linear(width, 4096), Relu(), Dropout(dropout)]
    return Chain(*layers, Linear(4096, classes))


def _resnet(depths: Sequence[int], bottleneck: bool) -> Callable[..., Chain]:
    def block(inputs: int, width: int, stride: int) -> tuple[Chain, int]:
        if bottleneck:
            outputs = 4 * width
            middle = [_convolution(width, width, 3, stride), Relu()]
            ends = [_convolution(inputs, width, 1), Relu()], [_convolution(width, outputs, 1)]
            body = Chain(*ends[0], *middle, *ends[1])
        else:
            outputs = width
            body = Chain(
                _convolution(inputs, width, 3, stride), Relu(), _convolution(width, width, 3)
            )
        same = inputs == outputs and stride == 1
        shortcut = Layer() if same else _convolution(inputs, outputs, 1, stride)
        return Residual(body=body, shortcut=shortcut, activation=Relu()), outputs

    def build(classes: int, dropout: float = 0.0) -> Chain:
        layers: list[Layer] = [_convolution(3, 64, 3), Relu()]
        inputs = 64
        for stage, depth in enumerate(depths):
            for position in range(depth):
                made, inputs = block(inputs, 64 << stage, 2 if stage and not position else 1)
                layers.append(made)
        return Chain(*layers, Average(1), Flatten(), Dropout(dropout), Linear(inputs, classes))

    return build


def _speednet(
    classes: int,
    widths: Sequence[int] = (64, 256, 256),
    depth: int = 2,
    stride: int = 1,
    dropout: float = 0.0,
) -> Chain:
    def block(channels: int) -> list[Layer]:
        return [Conv(channels, channels, 3), Norm(channels, scaled=False), Gelu()]

    def stage(inputs: int, outputs: int) -> Chain:
        return Chain(
            convolution=Conv(inputs, outputs, 3),
            pooling=Shrink(),
            first=Chain(Norm(outputs, scaled=False), Gelu()),
            second=Chain(*block(outputs)) if depth > 1 else Layer(),
            bridged=Chain(*[Bridge(*block(outputs)) for _ in range(depth - 2)]),
        )

    stages = [stage(inputs, outputs) for inputs, outputs in pairwise([24, *widths])]
    return Chain(
        whitening=Conv(3, 24, 2, stride, bias=True, trained=False),
        stages=Chain(Layer(), *stages),  # its GELU keeps nothing: what comes before is fixed
        pooling=Chain(GlobalMax(), Dropout(dropout)),
        head=Linear(widths[-1], classes, bias=False),
    )


NETWORKS: dict[str, Callable[..., Chain]] = {
    "tutorial": _tutorial([64], activated=False),
    "tutorial-wide": _tutorial([512, 64], activated=False),
    "tutorial-relu": _tutorial([512, 64], activated=True),
    "deep": _deep,
    "residual": _residual,
    "vgg16": _vgg16,
    "resnet18": _resnet([2, 2, 2, 2], bottleneck=False),
    "resnet34": _resnet([3, 4, 6, 3], bottleneck=False),
    "resnet50": _resnet([3, 4, 6, 3], bottleneck=True),
    "speednet": _speednet,
}


def describe_network(config: ModelConfig, classes: int) -> Chain:
    """Return the network that models.build_network would build."""
    options = {name: getattr(config, name) for name in ("dropout", "widths", "depth", "stride")}
    chosen = {name: value for name, value in options.items() if value is not None}
    return NETWORKS[config.name](classes, **chosen)
