"""The layers of CXRInception (Szegedy et al. 2016, "Rethinking the Inception Architecture").

`STAGES`, beside the configuration, is the network as a table: a stage is a sequence of layers, a block is branches run
side by side and concatenated, a branch is again a sequence. Parameter names follow that table; `cxr_backbone.weights`
maps them to those of timm, torchvision and Keras.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_cxr_inception import STAGES, Block, Conv, CXRInceptionConfig, PooledConv


class CXRInceptionConvLayer(nn.Module):
    def __init__(self, config: CXRInceptionConfig, in_channels: int, spec: Conv):
        super().__init__()
        height, width = (spec.kernel, spec.kernel) if isinstance(spec.kernel, int) else spec.kernel
        self.convolution = nn.Conv2d(
            in_channels,
            config.scale_width(spec.channels),
            kernel_size=(height, width),
            stride=spec.stride,
            padding=(height // 2, width // 2) if spec.same else 0,
            bias=False,
        )
        self.takes_rows = self.keeps_statistics = False
        self.normalization: nn.Module = nn.BatchNorm2d(self.convolution.out_channels, eps=config.batch_norm_eps)

    def forward(self, hidden_state: Tensor) -> Tensor:
        return F.relu(self.normalization(self._convolve(hidden_state)), inplace=True)

    def train(self, mode: bool = True) -> "CXRInceptionConvLayer":
        super().train(mode)
        if self.keeps_statistics:
            self.normalization.eval()
        return self

    def fuse(self) -> None:
        """Let the convolution do what BatchNorm does in eval mode."""
        if isinstance(self.normalization, nn.BatchNorm2d | nn.SyncBatchNorm):
            self.convolution = fuse_conv_bn_eval(self.convolution, self.normalization)
            self.normalization = nn.Identity()
        self.takes_rows = self.convolution.kernel_size == (1, 1)

    def _convolve(self, hidden_state: Tensor) -> Tensor:
        if not self.takes_rows or hidden_state.dtype != torch.float32:
            return self.convolution(hidden_state)
        # Each row of pixels is taken for an image: on one thread torch leaves oneDNN, and half of the speed, to batches
        # of 16 and more.
        batch, _, height, width = hidden_state.shape
        rows = hidden_state.permute(0, 2, 3, 1).flatten(0, 1).unsqueeze(1)  # (batch * height, 1, width, channels)
        rows = self.convolution(rows.permute(0, 3, 1, 2))  # (batch * height, out_channels, 1, width)
        return rows.permute(0, 2, 3, 1).reshape(batch, height, width, -1).permute(0, 3, 1, 2)


class CXRInceptionPooledConvLayer(CXRInceptionConvLayer):
    """Average pooling and a 1 x 1 convolution. It does not matter which is first, and pooling what the convolution has
    left, a fifth of the channels or less, is that much faster."""

    def __init__(self, config: CXRInceptionConfig, in_channels: int, spec: PooledConv):
        super().__init__(config, in_channels, Conv(spec.channels))
        self.pooling = nn.AvgPool2d(3, 1, padding=1, count_include_pad=config.avg_pool_count_include_pad)

    def forward(self, hidden_state: Tensor) -> Tensor:
        return F.relu(self.normalization(self.pooling(self._convolve(hidden_state))), inplace=True)

    def fuse(self) -> None:
        super().fuse()  # but a bias would be averaged with the padding, so it comes after the pooling
        self.normalization = _Shift(self.convolution.bias)
        self.convolution.bias = None


class _Shift(nn.Module):
    def __init__(self, bias: nn.Parameter):
        super().__init__()
        self.bias = bias

    def forward(self, hidden_state: Tensor) -> Tensor:
        return hidden_state + self.bias.view(-1, 1, 1)


class CXRInceptionBlock(nn.Module):
    def __init__(self, config: CXRInceptionConfig, in_channels: int, spec: Block):
        super().__init__()
        built = [build_sequence(config, in_channels, branch) for branch in spec.branches]
        self.branches = nn.ModuleList(branch for branch, _ in built)
        self.out_channels = sum(channels for _, channels in built)

    def forward(self, hidden_state: Tensor) -> Tensor:
        return torch.cat([branch(hidden_state) for branch in self.branches], dim=1)


class CXRInceptionStage(GradientCheckpointingLayer):
    """A run of layers at one resolution: what is frozen, unfrozen and handed out as a feature map."""

    def __init__(self, config: CXRInceptionConfig, in_channels: int, specs: tuple):
        super().__init__()
        self.layers, self.out_channels = build_sequence(config, in_channels, specs)
        self.frozen = False

    def forward(self, hidden_state: Tensor) -> Tensor:
        return self.layers(hidden_state)

    def train(self, mode: bool = True) -> "CXRInceptionStage":
        # A frozen stage stays in eval mode: in train mode BatchNorm would move its statistics, gradients or not.
        return super().train(mode and not self.frozen)

    def set_frozen(self, frozen: bool, training: bool) -> None:
        self.frozen = frozen
        self.requires_grad_(not frozen)
        self.train(training)


class CXRInceptionEncoder(nn.Module):
    """The five stages. With `bytes_at_once`, a CPU takes a batch in pieces whose pixels fill about so many."""

    def __init__(self, config: CXRInceptionConfig):
        super().__init__()
        self.bytes_at_once: int | None = None
        self.stages = nn.ModuleDict()
        channels = config.num_channels
        for name, specs in STAGES.items():
            stage = CXRInceptionStage(config, channels, specs)
            self.stages[name] = stage
            channels = stage.out_channels

    def forward(self, hidden_state: Tensor, every_stage: bool = True) -> tuple[Tensor, ...]:
        """The feature maps of the five stages, or of the last one alone."""
        if self.bytes_at_once is None or hidden_state.device.type != "cpu":
            return self._run(hidden_state, every_stage)
        images = max(self.bytes_at_once // (hidden_state[0, 0].numel() * hidden_state.element_size()), 1)
        pieces = [self._run(piece, every_stage) for piece in hidden_state.split(images)]
        return tuple(torch.cat(feature_maps) for feature_maps in zip(*pieces, strict=True))

    def _run(self, hidden_state: Tensor, every_stage: bool) -> tuple[Tensor, ...]:
        hidden_states: list[Tensor] = []
        for stage in self.stages.values():
            hidden_state = stage(hidden_state)
            if not every_stage:
                hidden_states.clear()  # and its memory is free for what comes
            hidden_states.append(hidden_state)
        return tuple(hidden_states)


class CXRInceptionHead(nn.Module):
    """Pooled features to logits: dropout and a linear layer, after the hidden layers that the config asks for."""

    def __init__(self, config: CXRInceptionConfig, in_features: int):
        super().__init__()
        layers: list[nn.Module] = []
        for size in config.head_hidden_sizes:
            layers += [nn.Dropout(config.dropout), nn.Linear(in_features, size), nn.ReLU()]
            in_features = size
        self.hidden_layers = nn.Sequential(*layers)
        self.dropout = nn.Dropout(config.dropout)
        self.output_layer = nn.Linear(in_features, config.num_labels)

    def forward(self, pooled_features: Tensor) -> Tensor:
        return self.output_layer(self.dropout(self.hidden_layers(pooled_features)))


class CXRInceptionAuxiliaryHead(nn.Module):
    """The paper's side head on stage 3. Adaptive pooling to 5 x 5 lets it take any image size."""

    def __init__(self, config: CXRInceptionConfig, in_channels: int):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(5)
        self.layers, channels = build_sequence(config, in_channels, (Conv(128), Conv(768, 5, same=False)))
        self.output_layer = nn.Linear(channels, config.num_labels)

    def forward(self, hidden_state: Tensor) -> Tensor:
        hidden_state = self.layers(self.pool(hidden_state))  # (batch, channels, 1, 1)
        return self.output_layer(hidden_state.flatten(1))


def build_sequence(config: CXRInceptionConfig, in_channels: int, specs: tuple) -> tuple[nn.Sequential, int]:
    """The layers that `specs` describe, run one after the other, and the number of channels they end with."""
    layers: list[nn.Module] = []
    for spec in specs:
        if isinstance(spec, Conv | PooledConv):
            layer_class = CXRInceptionConvLayer if isinstance(spec, Conv) else CXRInceptionPooledConvLayer
            layers.append(layer_class(config, in_channels, spec))
            in_channels = config.scale_width(spec.channels)
        elif isinstance(spec, Block):
            block = CXRInceptionBlock(config, in_channels, spec)
            layers.append(block)
            in_channels = block.out_channels
        else:
            layers.append(nn.MaxPool2d(3, 2))
    return nn.Sequential(*layers), in_channels
