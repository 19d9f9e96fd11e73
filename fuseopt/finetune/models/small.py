"""The small models: ordinary transformers models, so that the library saves them, loads them and names classes.

The parameters of each are named by what they do: stem (the input), body, neck, head (one output a class).
"""

from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.activations import ACT2FN
from transformers.modeling_outputs import ImageClassifierOutput, SequenceClassifierOutput

# With 1, as in torch, ten epochs of --data sentences get 79% of the test rows right; with this 91%.
EMBEDDING_STD = 0.1


class _Config(PretrainedConfig):
    def __init__(self, depth=1, width=64, activation="relu", dropout=0.1, **kwargs):
        self.depth, self.width, self.activation, self.dropout = depth, width, activation, dropout
        super().__init__(**kwargs)


class CnnConfig(_Config):
    """depth blocks of two convolutions; the first has `width` channels, each other twice those before it."""

    model_type = "fuseopt-cnn"

    def __init__(self, num_channels=1, depth=2, width=32, **kwargs):
        self.num_channels = num_channels
        super().__init__(depth, width, **kwargs)


class RnnConfig(_Config):
    """depth GRU layers of `width` units over the rows of images that are `image_width` pixels wide."""

    model_type = "fuseopt-rnn"

    def __init__(self, num_channels=1, image_width=8, depth=2, **kwargs):
        self.num_channels = num_channels
        self.image_width = image_width
        super().__init__(depth, **kwargs)


class MlpConfig(_Config):
    """depth hidden layers of `width` units over the mean of the token embeddings."""

    model_type = "fuseopt-mlp"

    def __init__(self, vocab_size=1000, pad_token_id=0, **kwargs):
        self.vocab_size = vocab_size
        super().__init__(pad_token_id=pad_token_id, **kwargs)


class _Small(PreTrainedModel):
    """What the three have in common: torch's own initialisation, and mean cross entropy where labels are given."""

    def _init_weights(self, module):
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
        if isinstance(module, nn.Embedding):
            module.weight.mul_(EMBEDDING_STD)

    def _finish(self, features, labels, output):
        logits = self.head(self.neck(features))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return output(loss=loss, logits=logits)


def _layer(inputs, outputs, config):
    return nn.Sequential(nn.Linear(inputs, outputs), ACT2FN[config.activation], nn.Dropout(config.dropout))


class _Block(nn.Module):
    """Two 3x3 convolutions, each with its activation."""

    def __init__(self, inputs, outputs, config):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.activation = ACT2FN[config.activation]

    def forward(self, x):
        return self.activation(self.conv2(self.activation(self.conv1(x))))


class Cnn(_Small):
    """Image classifier: stem and body (blocks), each block but the last halving the image while it can; neck; head.

    98,000 parameters by default; images (N, num_channels, H, W), float32, of any size from 4x4.
    """

    config_class = CnnConfig
    main_input_name = "pixel_values"

    def __init__(self, config):
        super().__init__(config)
        widths = [config.width * 2**i for i in range(config.depth)]
        self.stem = _Block(config.num_channels, widths[0], config)
        self.body = nn.ModuleList(_Block(a, b, config) for a, b in zip(widths, widths[1:]))
        self.neck = _layer(4 * widths[-1], 4 * config.width, config)
        self.head = nn.Linear(4 * config.width, config.num_labels)
        self.post_init()

    def forward(self, pixel_values, labels=None, **_):
        """ImageClassifierOutput of logits (N, classes), and of loss where labels (N,) are given."""
        x = self.stem(pixel_values)
        for block in self.body:
            if min(x.shape[-2:]) >= 4:  # the end needs 2x2 pixels
                x = nn.functional.max_pool2d(x, 2)
            x = block(x)
        x = nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)
        return self._finish(x, labels, ImageClassifierOutput)


class Rnn(_Small):
    """Image classifier: stem (a linear layer) on each row, body (a GRU) down the rows, neck, head.

    Images (N, num_channels, H, image_width), float32, of any height.
    """

    config_class = RnnConfig
    main_input_name = "pixel_values"

    def __init__(self, config):
        super().__init__(config)
        width, between = config.width, config.dropout if config.depth > 1 else 0.0
        self.stem = _layer(config.num_channels * config.image_width, width, config)
        self.body = nn.GRU(width, width, config.depth, batch_first=True, dropout=between)
        self.neck = _layer(width, width, config)
        self.head = nn.Linear(width, config.num_labels)
        self.post_init()

    def forward(self, pixel_values, labels=None, **_):
        """ImageClassifierOutput of logits (N, classes), and of loss where labels (N,) are given."""
        found, made_for = pixel_values.shape[-1], self.config.image_width
        if found != made_for:
            raise ValueError(f"the images are {found} pixels wide, this rnn was made for {made_for}")
        rows = pixel_values.transpose(1, 2).flatten(2)  # (N, H, channels * width)
        _, last = self.body(self.stem(rows))
        return self._finish(last[-1], labels, ImageClassifierOutput)


class Mlp(_Small):
    """Text classifier: stem (token embeddings), their mean over the tokens that are not padding, body, head."""

    config_class = MlpConfig
    main_input_name = "input_ids"

    def __init__(self, config):
        super().__init__(config)
        width = config.width
        self.stem = nn.Embedding(config.vocab_size, width, padding_idx=config.pad_token_id)
        self.body = nn.ModuleList(_layer(width, width, config) for _ in range(config.depth))
        self.neck = nn.Dropout(config.dropout)
        self.head = nn.Linear(width, config.num_labels)
        self.post_init()

    def get_input_embeddings(self):
        return self.stem

    def forward(self, input_ids, attention_mask=None, labels=None, **_):
        """SequenceClassifierOutput of logits (N, classes), and of loss where labels (N,) are given."""
        if attention_mask is None:
            attention_mask = input_ids != self.config.pad_token_id
        mask = attention_mask.unsqueeze(-1).to(self.stem.weight.dtype)
        x = (self.stem(input_ids) * mask).sum(1) / mask.sum(1).clamp(min=1)
        for layer in self.body:
            x = layer(x)
        return self._finish(x, labels, SequenceClassifierOutput)


SMALL = {"cnn": Cnn, "rnn": Rnn, "mlp": Mlp}

for _name, _model in SMALL.items():
    AutoConfig.register(_model.config_class.model_type, _model.config_class)
    _auto = AutoModelForSequenceClassification if _name == "mlp" else AutoModelForImageClassification
    _auto.register(_model.config_class, _model)
