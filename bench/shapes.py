"""The tensors that a step is measured on: parameter shapes of known models, written down as formulas."""

import math

Shapes = list[tuple[int, ...]]


def entries(shapes: Shapes) -> int:
    """Parameters in all."""
    return sum(map(math.prod, shapes))


def decoder(width: int, layers: int, tokens: int, positions: int) -> Shapes:
    """The matrices of a decoder: two embeddings, then four a layer."""
    layer = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    return [(tokens, width), (positions, width), *layer * layers]


def block(width: int) -> Shapes:
    """A transformer layer of GPT-2 or a ViT: two norms, attention as one matrix of q, k, v, and two linear layers."""
    w, norm = width, [(width,), (width,)]
    return [*norm, (3 * w, w), (3 * w,), (w, w), (w,), *norm, (4 * w, w), (4 * w,), (w, 4 * w), (w,)]


def gpt2() -> Shapes:
    """GPT-2 small; the head shares the first embedding."""
    return [(50257, 768), (1024, 768), *block(768) * 12, (768,), (768,)]


def vit_b16() -> Shapes:
    """ViT-B/16 for 1000 classes at 224 pixels: class token, 14 * 14 + 1 positions, patches of 16."""
    ends = [(1, 1, 768), (1, 197, 768), (768, 3, 16, 16), (768,), (768,), (768,), (1000, 768), (1000,)]
    return [*ends[:4], *block(768) * 12, *ends[4:]]


def resnet50() -> Shapes:
    """ResNet-50 for 1000 classes: every convolution is followed by the two vectors of its norm."""
    convolutions, inputs = [(64, 3, 7, 7)], 64
    for width, count in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for k in range(count):
            convolutions += [(width, inputs, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            convolutions += [(4 * width, inputs, 1, 1)] if k == 0 else []
            inputs = 4 * width
    return [s for c in convolutions for s in (c, c[:1], c[:1])] + [(1000, 2048), (1000,)]


def bert_lora(rank: int = 8) -> Shapes:
    """What LoRA trains in BERT-base: two thin matrices for the query and for the value of each layer."""
    return [(rank, 768), (768, rank)] * 2 * 12


TINY = (8, 8)  # so small that a step is calls, not arithmetic
SHAPES: dict[str, tuple[str, Shapes]] = {  # name on the command line: (in words, shapes)
    "one": ("16M parameters in 1 tensor", [(4096, 4096)]),
    "fifty": ("16M parameters in 50 tensors", decoder(320, 12, 6092, 256)),
    "resnet50": ("ResNet-50, 26M in 161", resnet50()),
    "vit": ("ViT-B/16, 87M in 152", vit_b16()),
    "gpt2": ("GPT-2, 124M in 148", gpt2()),
    "lora": ("LoRA of BERT, 0.3M in 48", bert_lora()),
    "tiny": ("1 tensor of 64", [TINY]),
    "10": ("10 tensors of 64", [TINY] * 10),
    "200": ("200 tensors of 64", [TINY] * 200),
    "1000": ("1000 tensors of 64", [TINY] * 1000),
}
QUICK: dict[str, Shapes] = {  # for --quick; shapes that do not stand here are small enough or not run
    "one": [(512, 512)],
    "fifty": decoder(40, 12, 760, 32),
}
