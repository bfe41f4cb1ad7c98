"""Modules of PyTorch without one counterpart in Keras, and small ones around single functions."""

import torch
import torch.nn.functional as F
from torch import nn
from torch_networks import each_of, images, made_of


def recurrent(kind, forward=lambda self, x: self.inner(x), **options):
    """Return a module around an `LSTM`, `GRU` or `RNN` of 4 to 6 channels."""
    return made_of(forward, inner=kind(4, 6, **options))


def states(self, x):
    """Results and both states of an `LSTM`, batch first."""
    y, (h, c) = self.inner(x)
    return y, h.transpose(0, 1), c.transpose(0, 1)


def state(self, x):
    y, h = self.inner(x)
    return y, h.transpose(0, 1)


def over_time(self, x):
    y, h = self.inner(x.transpose(0, 1))
    return y.transpose(0, 1), h.transpose(0, 1)


def from_zeros(self, x):
    zeros = torch.zeros(self.inner.num_layers, x.size(0), 6, device=x.device)
    y, (h, _) = self.inner(x, (zeros, zeros))
    return y, h.transpose(0, 1)


def from_other(self, x, y):
    """Sequence to sequence: the states of one go into the other."""
    _, end = self.encoder(x)
    return self.decoder(y, end)[0]


def learnt_state(self, x):
    return self.inner(x, self.begin.expand(-1, x.shape[0], -1))[0]


def attention(forward, **options):
    """Return a module around a `MultiheadAttention` of 8 channels and 2 heads."""
    options = {"batch_first": True} | options
    return made_of(forward, inner=nn.MultiheadAttention(8, 2, **options))


def causal(size):
    return torch.full((size, size), -torch.inf).triu(1)


def padding(*lengths, size=5):
    """Return masks that are true behind the first steps of each sample."""
    return torch.arange(size) >= torch.tensor(lengths)[:, None]


def padded_batch(n):
    return images(n, 5, 8), padding(*(1 + index % 5 for index in range(n)))


def both_masks(self, x, mask):
    blocked = self.causal.isinf()
    y, scores = self.inner(x, x, x, key_padding_mask=mask, attn_mask=blocked)
    return y, scores, self.inner(x, x, x, attn_mask=self.causal, need_weights=False)[0]


def per_head(self, x, mask):
    return self.inner(x, x, x, attn_mask=mask.flatten(0, 1), average_attn_weights=False)[1]


def attention_over_time(self, x):
    x = x.transpose(0, 1)
    return self.inner(x, x, x, is_causal=True, attn_mask=self.causal)[0].transpose(0, 1)


def transformer(self, x, y, mask):
    x = self.encoder(x, src_key_padding_mask=mask)
    return self.decoder(y, x, tgt_mask=self.causal, memory_key_padding_mask=mask)


def whole(self, x, y):
    return self.inner(x, y, tgt_mask=self.causal)


def layers(kind, count=2, **options):
    layer = getattr(nn, f"Transformer{kind}Layer")(8, 2, 16, batch_first=True, **options)
    quiet = {"enable_nested_tensor": False} if kind == "Encoder" else {}
    return getattr(nn, f"Transformer{kind}")(layer, count, **quiet)


def products(self, x, mask):
    mask = mask[:, None, :]
    y = F.scaled_dot_product_attention(x, x, x, attn_mask=~mask)
    heads, shared = x.unflatten(2, (4, 2)).transpose(1, 2), x.unflatten(2, (4, 2))[:, :, :2]
    shared = shared.transpose(1, 2)
    return y, F.scaled_dot_product_attention(heads, shared, shared, enable_gqa=True)


def asks_for_sizes(self, x):
    if x.dim() != 3 or len(x.size()) != 3 or len(x.shape) != 3:
        raise ValueError("Expected three axes")
    if x.shape[1] > 4 and x.dtype == torch.float32 and x.is_floating_point():
        x = x * 2
    return x * (x.shape[-1] ** -0.5) + x.new_zeros(x.shape[0], 1, x.shape[2])


def positions(self, x):
    """Two embeddings of positions: from a buffer, and from the length of the input."""
    steps = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
    return x + self.first(self.steps) + self.second(input=steps) + self.conv(input=x)


def movements(self, x):
    y = torch.roll(x, (1, -2), (1, 2)) + x.flip([1]) + x.mT.mT + x.narrow(1, 0, 5)
    y = y.select(1, 2) + x.index_select(1, self.order)[:, 0] + x.swapaxes(1, 2)[..., 0].sum(1, True)
    return y.cumsum(1), x.gather(1, x.argmax(1, keepdim=True)), x.repeat_interleave(2, 1)


def selections(self, x):
    best, where = x.topk(2)
    highest, place = x.max(1)
    least = x.min(dim=1, keepdim=True).values
    bounded = torch.max(torch.min(x, x * 2), x - 1)
    return best, where, highest, place, least, bounded, x.topk(3).indices, x.amax((1, 2))


def logic(self, x):
    inside = (x > -1) & (x <= 1) | ~(x >= 0) & (x != 2)
    return torch.where(inside, x.tril(), x.sign()), x.clamp(-1), x.clip(max=1), x.any(1), x // 2


def numbers(self, x):
    y = F.normalize(x, dim=-1) + F.glu(torch.cat([x, x], -1)) + x.logsumexp(1, keepdim=True)
    return y + x.sin() + x.abs().log1p() + x.prod(1, keepdim=True) + F.mish(x) + self.scale * x


CUT = {"kernel_size": 3, "stride": 2, "ceil_mode": True}

RECURRENT = {
    "LSTM of layers": (
        lambda: recurrent(nn.LSTM, states, num_layers=3, batch_first=True, dropout=0.2),
        lambda n: images(n, 5, 4),
    ),
    "LSTM both ways": (
        lambda: recurrent(nn.LSTM, states, num_layers=2, batch_first=True, bidirectional=True),
        lambda n: images(n, 5, 4),
    ),
    "GRU both ways": (
        lambda: recurrent(nn.GRU, state, bidirectional=True, batch_first=True, bias=False),
        lambda n: images(n, 5, 4),
    ),
    "GRU over time": (
        lambda: recurrent(nn.GRU, over_time, num_layers=2),
        lambda n: images(n, 5, 4),
    ),
    "RNN": (lambda: recurrent(nn.RNN, state, batch_first=True), lambda n: images(n, 5, 4)),
    "RNN with ReLU": (
        lambda: recurrent(nn.RNN, state, num_layers=2, nonlinearity="relu", batch_first=True),
        lambda n: images(n, 5, 4),
    ),
    "from zeros": (
        lambda: recurrent(nn.LSTM, from_zeros, batch_first=True),
        lambda n: images(n, 5, 4),
    ),
    "layers from zeros": (
        lambda: recurrent(nn.LSTM, from_zeros, batch_first=True, num_layers=2),
        lambda n: images(n, 5, 4),
    ),
    "sequence to sequence": (
        lambda: made_of(
            from_other,
            encoder=nn.LSTM(4, 6, 2, batch_first=True),
            decoder=nn.LSTM(3, 6, 2, batch_first=True),
        ),
        lambda n: (images(n, 5, 4), images(n, 7, 3)),
    ),
    "learnt state": (
        lambda: made_of(
            learnt_state,
            inner=nn.GRU(4, 6, batch_first=True),
            begin=nn.Parameter(torch.randn(1, 1, 6)),
        ),
        lambda n: images(n, 5, 4),
    ),
}
ATTENTION = {
    "masks": (
        lambda: _with_mask(attention(both_masks, dropout=0.1)),
        padded_batch,
    ),
    "masks that are added": (
        lambda: attention(lambda self, x, mask: self.inner(x, x, x, key_padding_mask=mask)[0]),
        lambda n: (images(n, 5, 8), images(n, 5)),
    ),
    "masks per head": (
        lambda: attention(per_head),
        lambda n: (images(n, 5, 8), images(n, 2, 5, 5)),
    ),
    "attention over time": (
        lambda: _with_mask(attention(attention_over_time, batch_first=False)),
        lambda n: images(n, 5, 8),
    ),
    "attention written out": (lambda: made_of(products), padded_batch),
    "encoder of layers": (lambda: layers("Encoder"), lambda n: images(n, 5, 8)),
    "encoder and decoder": (
        lambda: _with_mask(
            made_of(
                transformer,
                encoder=layers("Encoder", activation="gelu"),
                decoder=layers("Decoder", 1, norm_first=True),
            )
        ),
        lambda n: (images(n, 5, 8), images(n, 5, 8), padded_batch(n)[1]),
    ),
    "whole transformer": (
        lambda: _with_mask(made_of(whole, inner=nn.Transformer(8, 2, 1, 1, 16, batch_first=True))),
        lambda n: (images(n, 4, 8), images(n, 5, 8)),
    ),
}
SMALL = {
    "reflected": (
        lambda: each_of(
            nn.Conv2d(3, 4, 3, padding=(1, 2), padding_mode="reflect"),
            nn.Conv2d(4, 4, 3, padding="same", padding_mode="replicate", stride=1),
            nn.Conv2d(4, 2, 3, padding=1, padding_mode="circular", stride=2),
        ),
        lambda n: images(n, 3, 8, 8),
    ),
    "reflected, 1d": (
        lambda: made_of(
            lambda self, x: F.pad(self.conv(self.conv(x)), (1, 2), mode="reflect"),
            conv=nn.Conv1d(3, 3, 3, padding=1, padding_mode="circular"),
        ),
        lambda n: images(n, 3, 8),
    ),
    "padding layers": (
        lambda: each_of(nn.ReflectionPad2d(1), nn.ZeroPad2d((1, 0, 2, 1)), nn.ConstantPad1d(1, 2)),
        lambda n: images(n, 3, 8, 8),
    ),
    "ceil": (
        lambda: each_of(nn.MaxPool2d(**CUT), nn.AvgPool2d(2, ceil_mode=True), nn.MaxPool2d(2)),
        lambda n: images(n, 3, 18, 18),
    ),
    "zeros left out": (
        lambda: each_of(
            nn.AvgPool2d(3, 1, 1, count_include_pad=False),
            nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False),
            nn.AvgPool2d(3, 1, 1),
        ),
        lambda n: images(n, 3, 7, 7),
    ),
    "adaptive": (
        lambda: each_of(nn.AdaptiveMaxPool2d(6), nn.AdaptiveMaxPool2d(3), nn.AdaptiveMaxPool2d(1)),
        lambda n: images(n, 3, 8, 8),
    ),
    "norms": (
        lambda: each_of(
            nn.InstanceNorm2d(3, affine=True), nn.InstanceNorm2d(3), nn.Flatten(2), nn.RMSNorm(16)
        ),
        lambda n: images(n, 3, 4, 4),
    ),
    "dropouts": (
        lambda: each_of(nn.Conv1d(4, 4, 3), nn.Dropout1d(), nn.LogSoftmax(1), nn.Dropout(0.1)),
        lambda n: images(n, 4, 6),
    ),
    "shuffled": (
        lambda: each_of(nn.ChannelShuffle(2), nn.PixelShuffle(2), nn.Softmax2d()),
        lambda n: images(n, 8, 4, 4),
    ),
    "more activations": (
        lambda: each_of(
            *(nn.CELU(0.5), nn.Mish(), nn.Softsign(), nn.Tanhshrink(), nn.Softshrink(0.1)),
            *(nn.Hardshrink(0.2), nn.LogSigmoid(), nn.Threshold(-1.0, -2.0), nn.GLU(-1)),
        ),
        lambda n: images(n, 6) * 3,
    ),
    "asks for sizes": (lambda: made_of(asks_for_sizes), lambda n: images(n, 5, 4)),
    "positions": (
        lambda: made_of(
            positions,
            steps=nn.Buffer(torch.arange(5)),
            first=nn.Embedding(5, 4),
            second=nn.Embedding(7, 4),
            conv=nn.Conv1d(5, 5, 3, padding=1, padding_mode="circular"),
        ),
        lambda n: images(n, 5, 4),
    ),
    "movements": (
        lambda: made_of(movements, order=nn.Buffer(torch.tensor([2, 0, 1]))),
        lambda n: images(n, 5, 4),
    ),
    "selections": (lambda: made_of(selections), lambda n: images(n, 5, 4)),
    "logic": (lambda: made_of(logic), lambda n: images(n, 4, 4)),
    "numbers": (
        lambda: made_of(numbers, scale=nn.Parameter(torch.randn(4))),
        lambda n: images(n, 5, 4),
    ),
}


def _with_mask(module):
    module.register_buffer("causal", causal(5))
    return module


COMPOSITES = RECURRENT | ATTENTION | SMALL
