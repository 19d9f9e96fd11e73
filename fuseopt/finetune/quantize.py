"""8-bit weights for storage and inference, by torchao, where torch's own quantisation lives today.

torch.ao.quantization and the quantised tensors of torch itself are deprecated in its favour. A weight w becomes
round(w / scale) in int8, with one float scale an output row and no offset: zeros stay zeros. Activations stay as they
are. nn.Linear and nn.Embedding compute from torchao's tensor; it has nothing for convolutions and recurrent layers,
whose weights are kept in the same tensor and turned into floats in each forward pass.
"""

import copy
from dataclasses import dataclass, field

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from fuseopt.finetune.checks import shortened

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv1D)
RECURRENT = (nn.RNN, nn.GRU, nn.LSTM)
MARK = ("parametrizations.", ".original")  # what parametrize puts around a parameter's name


@dataclass
class QuantizeOptions:
    """8-bit weights, off by default."""

    _argument_group_name = "8-bit export"

    quantize: bool = field(
        default=False,
        metadata={"help": "At the end also write the model with 8-bit weights, and its accuracy. Needs torchao."},
    )


def torchao():
    """The module torchao.quantization; raises ValueError where it is not installed."""
    try:
        import torchao.quantization as found
    except ImportError as error:
        raise ValueError(f"--quantize needs the package torchao ({error}): pip install torchao") from error
    return found


def quantized(model):
    """A copy of `model` in eval mode that computes from 8-bit weights; ValueError without torchao or a layer for it.

    Quantised are the weights of nn.Linear, nn.Embedding, convolutions and recurrent layers; biases, norms and other
    parameters stay as they are. Compare it with the weights that it came from by accuracy: it is for inference alone.
    """
    ao = torchao()
    model = copy.deepcopy(model).eval().requires_grad_(False)
    own = ao.Int8WeightOnlyConfig(set_inductor_config=False)
    ao.quantize_(model, own, lambda module, _: type(module) in (nn.Linear, nn.Embedding) and _is_float(module.weight))
    for module in list(model.modules()):
        if type(module) in CONVOLUTIONS:
            _keep_8_bit(ao, module, ["weight"])
        elif type(module) in RECURRENT:
            _keep_8_bit(ao, module, [name for name, p in module.named_parameters() if p.ndim == 2])
            module.register_forward_hook(_drop)
    if not any(_is_8_bit(x) for x in _tensors(model).values()):
        raise ValueError(f"--quantize: {type(model).__name__} has no linear, embedding, convolution or recurrent layer")
    return model


def _is_8_bit(tensor):
    return hasattr(tensor, "qdata")


def _is_float(weight):
    """Whether it can be quantised; not twice, where modules share it."""
    return weight.is_floating_point() and not _is_8_bit(weight)


class _Dequantised(nn.Module):
    """The parametrisation that gives a layer its weight back, in the shape that it had."""

    def __init__(self, shape):
        super().__init__()
        self.shape = shape

    def forward(self, weight):
        return weight.dequantize().view(self.shape)


def _keep_8_bit(ao, module, names):
    """Keep these parameters as torchao's 8-bit tensor, one scale a row; the layer sees floats."""
    for name in names:
        p = getattr(module, name).detach()
        rows = ao.Int8Tensor.from_hp(p.flatten(1), ao.PerRow())
        setattr(module, name, nn.Parameter(rows, requires_grad=False))
        parametrize.register_parametrization(module, name, _Dequantised(p.shape), unsafe=True)


def _drop(module, *_):
    """A recurrent layer collects its weights anew in each forward pass, and would keep the floats till the next."""
    module._flat_weights = [None] * len(module._flat_weights_names)


# ---- files -----------------------------------------------------------------------------------------


def _tensors(model):
    """{name: tensor} of parameters and buffers, each once, under the names that the float model has."""
    found, seen = {}, set()
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) not in seen:
            seen.add(id(value))
            found[name.replace(MARK[0], "").removesuffix(MARK[1])] = value.detach()
    return found


def _parts(model):
    """{name: plain tensor} as they lie in the file; of an 8-bit weight the integers, and the scales as NAME.scale."""
    parts = {}
    for name, value in _tensors(model).items():
        parts |= {name: value.qdata, f"{name}.scale": value.scale} if _is_8_bit(value) else {name: value}
    return parts


def size(model):
    """Bytes of the parameters and buffers of a model, quantised or not, as a file holds them."""
    return sum(x.numel() * x.element_size() for x in _parts(model).values())


def save(model, path):
    """Write a quantised model's tensors to a safetensors file: int8 weights under their names, NAME.scale beside."""
    save_file({name: x.contiguous() for name, x in _parts(model).items()}, path)


def load(model, path):
    """`model`, a float one of the architecture that was saved, with the 8-bit weights of the file `path`.

    It computes the same bits as the saved one. Raises ValueError that names what does not fit, OSError.
    """
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from error
    model = quantized(model)
    parts = _parts(model)
    if parts.keys() != tensors.keys():
        raise ValueError(f"{path} is of another architecture; it differs in {shortened(parts.keys() ^ tensors.keys())}")
    for name, x in parts.items():
        if (x.shape, x.dtype) != (tensors[name].shape, tensors[name].dtype):
            found = f"{tuple(tensors[name].shape)} {tensors[name].dtype}"
            raise ValueError(f"{path}: {name} is {found}, this model needs {tuple(x.shape)} {x.dtype}")
    with torch.no_grad():
        for name, x in parts.items():
            x.copy_(tensors[name])
    return model
