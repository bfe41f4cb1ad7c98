"""Networks written in PyTorch: torchvision-style ones with a width, and small awkward ones."""

import torch
import torch.nn.functional as F
from torch import nn


class BasicBlock(nn.Module):
    """Two convolutions and a shortcut, as in torchvision's ResNet."""

    def __init__(self, channels_in, channels, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = None
        if stride != 1 or channels_in != channels:
            conv = nn.Conv2d(channels_in, channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(channels))

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet18(nn.Module):
    """torchvision's ResNet-18 with `width` channels in its first stage (64 there)."""

    def __init__(self, width=8, classes=5, blocks=(2, 2, 2, 2)):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        channels = width
        for stage, count in enumerate(blocks):
            wide = width * 2**stage
            layers = [BasicBlock(channels, wide, 1 if stage == 0 else 2)]
            layers += [BasicBlock(wide, wide, 1) for _ in range(count - 1)]
            setattr(self, f"layer{stage + 1}", nn.Sequential(*layers))
            channels = wide
        self.stages = len(blocks)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(channels, classes)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for stage in range(self.stages):
            x = getattr(self, f"layer{stage + 1}")(x)
        return self.fc(torch.flatten(self.avgpool(x), 1))


class ConvNormActivation(nn.Sequential):
    """A convolution, a normalization and a ReLU6."""

    def __init__(self, channels_in, channels, kernel=3, stride=1, groups=1):
        super().__init__(
            nn.Conv2d(
                channels_in, channels, kernel, stride, kernel // 2, groups=groups, bias=False
            ),
            nn.BatchNorm2d(channels),
            nn.ReLU6(inplace=True),
        )


class InvertedResidual(nn.Module):
    """Widen, filter each channel, narrow: the block of MobileNetV2."""

    def __init__(self, channels_in, channels, stride, expansion):
        super().__init__()
        hidden = channels_in * expansion
        layers = [ConvNormActivation(channels_in, hidden, 1)] if expansion > 1 else []
        layers += [
            ConvNormActivation(hidden, hidden, 3, stride, groups=hidden),
            nn.Conv2d(hidden, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        ]
        self.use_res_connect = stride == 1 and channels_in == channels
        self.conv = nn.Sequential(*layers)

    def forward(self, x):
        return x + self.conv(x) if self.use_res_connect else self.conv(x)


class MobileNetV2(nn.Module):
    """torchvision's MobileNetV2 with its channels divided by 32 / `width`."""

    SETTINGS = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 1, 2), (6, 96, 1, 1))

    def __init__(self, width=8, classes=5, settings=SETTINGS):
        super().__init__()
        channels = width
        features = [ConvNormActivation(3, channels, stride=2)]
        for expansion, wide, count, stride in settings:
            wide = max(wide * width // 32, 4)
            for index in range(count):
                step = stride if index == 0 else 1
                features.append(InvertedResidual(channels, wide, step, expansion))
                channels = wide
        features.append(ConvNormActivation(channels, 4 * channels, 1))
        self.features = nn.Sequential(*features)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(4 * channels, classes))

    def forward(self, x):
        x = self.features(x)
        x = F.adaptive_avg_pool2d(x, (1, 1))
        return self.classifier(torch.flatten(x, 1))


class Attention(nn.Module):
    """Self-attention as in timm: one projection to queries, keys and values."""

    def __init__(self, size, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(size, 3 * size)
        self.proj = nn.Linear(size, size)

    def forward(self, x):
        batch, length, size = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.heads, size // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(batch, length, size))


class ViTBlock(nn.Module):
    """Attention and a perceptron, each with a normalization before and a shortcut."""

    def __init__(self, size, heads, fused):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(size, eps=1e-6), nn.LayerNorm(size, eps=1e-6)
        self.fused = fused
        if fused:
            self.attn = Attention(size, heads)
        else:
            self.attn = nn.MultiheadAttention(size, heads, dropout=0.1, batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(size, 2 * size), nn.GELU(), nn.Dropout(0.1), nn.Linear(2 * size, size)
        )

    def forward(self, x):
        y = self.norm1(x)
        x = x + (self.attn(y) if self.fused else self.attn(y, y, y, need_weights=False)[0])
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """A class token, positions, blocks and a head on the token; `fused` as in timm."""

    def __init__(self, size=16, heads=2, depth=2, image=16, patch=4, classes=5, fused=False):
        super().__init__()
        self.conv_proj = nn.Conv2d(3, size, patch, patch)
        self.class_token = nn.Parameter(torch.randn(1, 1, size) * 0.1)
        self.pos_embedding = nn.Parameter(torch.randn(1, (image // patch) ** 2 + 1, size) * 0.1)
        self.blocks = nn.Sequential(*(ViTBlock(size, heads, fused) for _ in range(depth)))
        self.norm = nn.LayerNorm(size)
        self.head = nn.Linear(size, classes)

    def forward(self, x):
        x = self.conv_proj(x)
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], dim=1)
        x = self.norm(self.blocks(x + self.pos_embedding))
        return self.head(x[:, 0])


def made_of(forward, **parts):
    """Return a module with the given parts whose `forward` is a function of it and the inputs."""
    module = type("Network", (nn.Module,), {"forward": forward})()
    for name, part in parts.items():
        setattr(module, name, part)
    return module


def images(*shape):
    """Return random numbers of a shape."""
    return torch.randn(*shape)


def tokens(*shape):
    """Return random tokens from 0 to 9."""
    return torch.randint(0, 10, shape)


def unfused(self, x):
    q, k, v = self.qkv(x).chunk(3, dim=-1)
    scores = torch.bmm(q, k.transpose(1, 2)) / 2.0
    return torch.bmm(scores.softmax(dim=-1), v)


def functional(self, x):
    x = F.max_pool2d(F.relu(input=self.conv(input=x)), 2)
    x = F.avg_pool2d(F.leaky_relu(x, 0.2), 2) - 0.5
    x = F.dropout(F.silu(x.mean((2, 3))), 0.3, self.training)
    return F.softmax(x.view(x.size(0), 2, -1).permute(0, 2, 1).reshape(x.shape[0], -1), dim=-1)


def arithmetic(self, x):
    y = 2 + x - (1 - x) * x / 3
    y = torch.where(y > 0, y, -y).unsqueeze(1).squeeze(1).clamp(min=0.1)
    return torch.clamp(y * torch.sigmoid(x), 0.0, 2.0).float().contiguous()


def languages(self, x):
    x = self.embed(x) + self.positions(torch.arange(x.shape[1], device=x.device))
    x = F.scaled_dot_product_attention(x, x, x, is_causal=True)
    return F.linear(self.norm(x), self.embed.weight)


def halves(self, x):
    first, second = torch.split(self.conv(x), [1, 3], dim=1)
    return torch.cat([first * 2, second, x], 1)


def pooled_text(self, x):
    x, state = self.recurrent(self.embed(x))
    return self.head(torch.cat([x[:, -1], state[0][-1]], 1))


def pooled_gru(self, x):
    _, state = self.recurrent(x)
    return self.head(state.squeeze(0))


def repeated(self, x):
    x = torch.cat([self.token.repeat(x.shape[0], 1, 1), x], 1)
    return F.pad(torch.stack([x, x + 1], 1).flatten(1, 2), (0, 0, 1, 0)) + self.shift


def masked(self, x):
    y = F.scaled_dot_product_attention(x, x, x, attn_mask=self.mask, scale=0.3)
    y = y + F.scaled_dot_product_attention(x, x, x, scale=0.2)
    y = y.masked_fill(y > 1.0, 1.0).chunk(1, dim=1)[0].expand(-1, 5, 4)
    ones = torch.ones(1, 2, device=x.device).repeat(1, 2) * y.clamp(max=0.5).float()
    return ones + self.mask.unsqueeze(0)[:, :, :1].expand(1, 5, 4).repeat(1, 1, 1)


def with_buffer(**parts):
    module = made_of(repeated, token=nn.Parameter(torch.randn(1, 1, 4)), **parts)
    module.register_buffer("shift", torch.randn(4))
    return module


def each_of(*layers):
    return nn.Sequential(*layers)


# name: (function that makes the module, functions of the batch size that make its inputs)
AWKWARD = {
    "asymmetric": (
        lambda: each_of(nn.Conv2d(3, 4, (3, 5), stride=(2, 1), padding=(1, 0))),
        lambda n: images(n, 3, 8, 8),
    ),
    "same": (
        lambda: each_of(nn.Conv2d(3, 4, 4, padding="same", dilation=2), nn.Conv2d(4, 2, 3)),
        lambda n: images(n, 3, 9, 9),
    ),
    "valid": (
        lambda: each_of(nn.Conv2d(3, 4, 3, padding="valid"), nn.PReLU(4), nn.PReLU()),
        lambda n: images(n, 3, 5, 5),
    ),
    "grouped": (
        lambda: each_of(nn.Conv2d(4, 6, 3, groups=2, padding=1), nn.GroupNorm(3, 6)),
        lambda n: images(n, 4, 6, 6),
    ),
    "depthwise": (
        lambda: each_of(nn.Conv2d(4, 8, 3, groups=4, stride=2, padding=1)),
        lambda n: images(n, 4, 8, 8),
    ),
    "1d": (
        lambda: each_of(
            nn.Conv1d(4, 5, 3, stride=2, padding=2),
            nn.Conv1d(5, 5, 3, groups=5, padding=1, bias=False),
            nn.BatchNorm1d(5, affine=False),
            nn.AvgPool1d(2),
            nn.ConvTranspose1d(5, 3, 3, 2, 1),
            nn.MaxPool1d(3, 1, 1),
            nn.AdaptiveAvgPool1d(1),
        ),
        lambda n: images(n, 4, 13),
    ),
    "3d": (
        lambda: each_of(
            nn.Conv3d(2, 3, 3, stride=2, padding=1),
            nn.BatchNorm3d(3, eps=1e-3, momentum=0.3),
            nn.ConvTranspose3d(3, 4, 3, 2, 1, output_padding=1),
            nn.MaxPool3d(2),
            nn.Dropout3d(),
            nn.AdaptiveAvgPool3d(1),
            nn.Flatten(),
        ),
        lambda n: images(n, 2, 8, 8, 8),
    ),
    "transposed": (
        lambda: each_of(
            nn.ConvTranspose2d(3, 4, 2, 2),
            nn.ConvTranspose2d(4, 4, 4, 2, 1, bias=False),
            nn.ConvTranspose2d(4, 2, 3, 1, dilation=2),
        ),
        lambda n: images(n, 3, 4, 4),
    ),
    "pooling": (
        lambda: each_of(
            nn.AvgPool2d(3, 2, 1),
            nn.Upsample(scale_factor=2),
            nn.Dropout2d(),
            nn.Upsample(scale_factor=2, mode="bilinear"),
            nn.AdaptiveAvgPool2d((4, 8)),
            nn.AdaptiveAvgPool2d((3, 3)),
        ),
        lambda n: images(n, 3, 8, 8),
    ),
    "perceptron": (
        lambda: each_of(
            nn.Linear(4, 5),
            nn.LayerNorm((3, 5)),
            nn.GELU(),
            nn.Linear(5, 6, bias=False),
            nn.LayerNorm(6, elementwise_affine=False),
            nn.GELU("tanh"),
            nn.Identity(),
            nn.Unflatten(2, (2, 3)),
            nn.Softmax(-1),
        ),
        lambda n: images(n, 3, 4),
    ),
    "activations": (
        lambda: each_of(
            nn.LeakyReLU(0.2),
            nn.SiLU(),
            nn.Hardswish(),
            nn.Hardtanh(-0.5, 2.0),
            nn.ELU(0.5),
            nn.Tanh(),
            nn.Softplus(),
            nn.Hardsigmoid(),
            nn.Sigmoid(),
            nn.SELU(),
        ),
        lambda n: images(n, 5) * 3,
    ),
    "vector": (
        lambda: each_of(nn.BatchNorm1d(4), nn.PReLU(4), nn.Flatten()),
        lambda n: images(n, 4),
    ),
    "functional": (
        lambda: made_of(functional, conv=nn.Conv2d(3, 4, 3)),
        lambda n: images(n, 3, 10, 10),
    ),
    "arithmetic": (lambda: made_of(arithmetic), lambda n: images(n, 5)),
    "halves": (lambda: made_of(halves, conv=nn.Conv2d(3, 4, 1)), lambda n: images(n, 3, 4, 4)),
    "unfused": (lambda: made_of(unfused, qkv=nn.Linear(4, 12)), lambda n: images(n, 5, 4)),
    "language": (
        lambda: made_of(
            languages,
            embed=nn.Embedding(10, 4),
            positions=nn.Embedding(6, 4),
            norm=nn.LayerNorm(4),
        ),
        lambda n: tokens(n, 6),
    ),
    "lstm": (
        lambda: made_of(
            pooled_text,
            embed=nn.Embedding(10, 4, padding_idx=0),
            recurrent=nn.LSTM(4, 6, batch_first=True),
            head=nn.Linear(12, 3),
        ),
        lambda n: tokens(n, 5),
    ),
    "gru": (
        lambda: made_of(pooled_gru, recurrent=nn.GRU(4, 6, batch_first=True), head=nn.Linear(6, 3)),
        lambda n: images(n, 5, 4),
    ),
    "repeated": (with_buffer, lambda n: images(n, 5, 4)),
    "attention of others": (
        lambda: made_of(
            lambda self, x, y: self.attention(x, y, y)[0],
            attention=nn.MultiheadAttention(8, 2, batch_first=True, kdim=4, vdim=4, bias=False),
        ),
        lambda n: (images(n, 5, 8), images(n, 3, 4)),
    ),
    "encoder": (
        lambda: each_of(
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True),
        ),
        lambda n: images(n, 5, 8),
    ),
    "shared": (
        lambda: made_of(lambda self, x: self.fc(self.fc(x).relu()) + x, fc=nn.Linear(4, 4)),
        lambda n: images(n, 4),
    ),
    "default": (
        lambda: made_of(
            lambda self, x, scale=None: self.fc(x if scale is None else x * scale),
            fc=nn.Linear(4, 4),
        ),
        lambda n: images(n, 4),
    ),
    "no biases": (
        lambda: made_of(
            lambda self, x: self.second(self.first(x)[0])[0],
            first=nn.LSTM(4, 5, batch_first=True, bias=False),
            second=nn.GRU(5, 3, batch_first=True, bias=False),
        ),
        lambda n: images(n, 6, 4),
    ),
    "clashing names": (
        lambda: made_of(
            lambda self, x: self.add(x) + self.x(x) + (x + 1.0),
            add=nn.Linear(4, 4),
            x=nn.Sequential(nn.Linear(4, 4), nn.ReLU()),
            add_1=nn.ReLU(),
        ),
        lambda n: images(n, 4),
    ),
    "masked": (
        lambda: made_of(masked, mask=nn.Parameter(torch.randn(5, 5))),
        lambda n: images(n, 5, 4),
    ),
    "dict": (
        lambda: made_of(lambda self, x: {"a": self.fc(x), "b": (x * 2, x)}, fc=nn.Linear(4, 4)),
        lambda n: images(n, 4),
    ),
}
NETWORKS = {
    "ResNet-18": (ResNet18, lambda n: images(n, 3, 32, 32)),
    "MobileNetV2": (MobileNetV2, lambda n: images(n, 3, 32, 32)),
    "ViT": (VisionTransformer, lambda n: images(n, 3, 16, 16)),
    "ViT, fused": (lambda: VisionTransformer(fused=True), lambda n: images(n, 3, 16, 16)),
    **AWKWARD,
}


def randomized(module):
    """Return a module with weights and running statistics of every size, none at its default."""
    with torch.no_grad():
        for each in module.modules():
            if isinstance(each, nn.modules.batchnorm._BatchNorm):
                each.running_mean.normal_(0, 0.3)
                each.running_var.uniform_(0.5, 2.0)
                each.num_batches_tracked += 7
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return module
