"""Writes tiny Hugging Face folders whose linear layers are quantised, as the packages do that make
such folders: codes are chosen here, packed here, and dequantised in float64 by the formula
scale * (code - zero)."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tiny
from safetensors.numpy import save_file

CONFIG = tiny.BASE | {"hidden_size": 128, "intermediate_size": 256}
Tensors = dict[str, np.ndarray]
# Layers with the inputs of another one: GPTQ finds the same order for both.
SHARES = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}


@dataclass(frozen=True)
class Codes:
    """Of one layer, [rows][inputs]; scales and zeros [rows][groups]."""

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray
    group_of: np.ndarray  # [inputs]
    bits: int

    def weights(self) -> np.ndarray:
        """In float64."""
        scales = self.scales.astype(np.float64)[:, self.group_of]
        return scales * (self.codes.astype(np.float64) - self.zeros[:, self.group_of])


def quantize(
    weights: np.ndarray,
    bits: int,
    group: int,
    zeros: bool,
    order: np.ndarray | None = None,
    dtype: str = "f2",
) -> Codes:
    """Every `group` inputs (0: all), in a given order, share a scale and a zero point; without
    `zeros` that is the middle of the codes."""
    rows, cols = weights.shape
    size = group or cols
    groups = -(-cols // size)
    group_of = np.empty(cols, np.int32)
    group_of[np.arange(cols) if order is None else order] = np.arange(cols) // size
    scales, points = np.empty((rows, groups)), np.full((rows, groups), 2 ** (bits - 1))
    for g in range(groups):
        part = weights[:, group_of == g]
        low, high = part.min(1).clip(max=0), part.max(1).clip(min=0)
        top = np.maximum(high, -low) * 2 if not zeros else high - low
        scales[:, g] = (top / (2**bits - 1)).astype(dtype)
        if zeros:
            points[:, g] = np.rint(-low / scales[:, g]).clip(0, 2**bits - 1)
    codes = np.rint(weights / scales[:, group_of] + points[:, group_of]).clip(0, 2**bits - 1)
    return Codes(codes.astype(np.uint8), scales.astype(dtype), points, group_of, bits)


def pack(codes: np.ndarray, axis: int, bits: int) -> np.ndarray:
    """As many codes along an axis as fit share 32 bits, the first in the lowest ones."""
    each = 32 // bits
    lots = np.moveaxis(codes, axis, -1).astype(np.uint32)
    lots = np.pad(lots, [(0, 0)] * (lots.ndim - 1) + [(0, -lots.shape[-1] % each)])
    lots = lots.reshape(*lots.shape[:-1], -1, each)
    words = np.bitwise_or.reduce(lots << np.arange(0, 32, bits, dtype=np.uint32), -1)
    return np.ascontiguousarray(np.moveaxis(words, -1, axis)).view(np.int32)


def gptq(layer: Codes, version: int = 1) -> Tensors:
    zeros = pack(layer.zeros.T, 1, layer.bits).view(np.uint32)
    if version == 1:
        zeros = zeros - np.uint32(0x11111111 if layer.bits == 4 else 0x01010101)
    return {
        "qweight": pack(layer.codes.T, 0, layer.bits),
        "qzeros": zeros.view(np.int32),
        "scales": layer.scales.T,
        "g_idx": layer.group_of,
    }


def awq(layer: Codes) -> Tensors:
    def pack_columns(codes: np.ndarray) -> np.ndarray:
        mixed = codes.reshape(len(codes), -1, 8)[:, :, [0, 2, 4, 6, 1, 3, 5, 7]]
        return pack(mixed.reshape(len(codes), -1), 1, 4)

    return {
        "qweight": pack_columns(layer.codes.T),
        "qzeros": pack_columns(layer.zeros.T),
        "scales": layer.scales.T,
    }


def packed(layer: Codes, zeros: bool = False, ordered: bool = False) -> Tensors:
    tensors = {
        "weight_packed": pack(layer.codes, 1, layer.bits),
        "weight_scale": layer.scales,
        "weight_shape": np.array(layer.codes.shape, np.int64),
    }
    tensors |= {"weight_zero_point": pack(layer.zeros, 0, layer.bits)} if zeros else {}
    return tensors | ({"weight_g_idx": layer.group_of} if ordered else {})


def in_bytes(layer: Codes, zeros: bool = False, one: bool = False) -> Tensors:
    tensors = {
        "weight": (layer.codes.astype(np.int16) - 128).astype(np.int8),
        "weight_scale": layer.scales[0] if one else layer.scales,
    }
    points = (layer.zeros - 128).astype(np.int8)
    return tensors | ({"weight_zero_point": points} if zeros else {})


def scheme(bits: int, group: int, symmetric: bool, form: str, strategy: str = "") -> dict:
    """A quantization_config of compressed-tensors."""
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": strategy or ("group" if group else "channel"),
        "group_size": group or None,
        "dynamic": False,
        "actorder": None,
    }
    inputs = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
    rounded = {"input_activations": None if form == "pack-quantized" else inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, **rounded}},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
    }


@dataclass(frozen=True)
class Kind:
    config: dict  # quantization_config
    pack: Callable[[Codes], Tensors]
    bits: int
    group: int
    zeros: bool
    ordered: bool = False  # groups of inputs that are not neighbours
    apart: bool = False  # other ones in every layer
    one_scale: bool = False
    dtype: str = "f2"


def _gptq(
    bits: int,
    group: int,
    zeros: bool,
    ordered: bool = False,
    apart: bool = False,
    **more: object,
) -> Kind:
    config = {"quant_method": "gptq", "bits": bits, "group_size": group or -1}
    config |= {"sym": not zeros, "desc_act": ordered, "damp_percent": 0.01, **more}
    version = 2 if more.get("checkpoint_format") == "gptq_v2" else 1
    return Kind(config, lambda c: gptq(c, version), bits, group, zeros, ordered, apart)


def _awq(group: int) -> Kind:
    config = {"quant_method": "awq", "bits": 4, "group_size": group or -1}
    config |= {"zero_point": True, "version": "gemm", "modules_to_not_convert": None}
    return Kind(config, awq, 4, group, True)


def _packed(bits: int, group: int, zeros: bool, ordered: bool = False, dtype: str = "f2") -> Kind:
    config = scheme(bits, group, not zeros, "pack-quantized")
    config["config_groups"]["group_0"]["weights"]["actorder"] = "group" if ordered else None
    make = lambda c: packed(c, zeros, ordered)  # noqa: E731
    return Kind(config, make, bits, group, zeros, ordered, dtype=dtype)


def _bytes(group: int, zeros: bool, form: str = "int-quantized") -> Kind:
    config = scheme(8, group, not zeros, form)
    return Kind(config, lambda c: in_bytes(c, zeros), 8, group, zeros)


KINDS = {
    "gptq_32": _gptq(4, 32, True),
    "gptq_64": _gptq(4, 64, False),
    "gptq_128": _gptq(4, 128, True, checkpoint_format="gptq"),
    "gptq_rows": _gptq(4, 0, True),
    "gptq_v2": _gptq(4, 32, True, checkpoint_format="gptq_v2"),
    "gptq_ordered": _gptq(4, 32, True, ordered=True),
    "gptq_ordered_64": _gptq(4, 64, False, ordered=True),
    "gptq_ordered_128": _gptq(4, 128, True, ordered=True, checkpoint_format="gptq_v2"),
    "gptq_ordered_48": _gptq(4, 48, True, ordered=True),
    "gptq_apart": _gptq(4, 32, True, ordered=True, apart=True),
    "gptq_8": _gptq(8, 64, True),
    "gptq_8_ordered": _gptq(8, 64, True, ordered=True),
    "awq_32": _awq(32),
    "awq_64": _awq(64),
    "awq_128": _awq(128),
    "awq_rows": _awq(0),
    "packed_32": _packed(4, 32, False),
    "packed_zeros": _packed(4, 128, True),
    "packed_ordered": _packed(4, 32, False, ordered=True),
    "packed_ordered_64": _packed(4, 64, True, ordered=True),
    "packed_ordered_128": _packed(4, 128, False, ordered=True),
    "packed_rows": _packed(4, 0, False, dtype="f4"),
    "packed_8": _packed(8, 0, False),
    "bytes_rows": _bytes(0, False),
    "bytes_groups": _bytes(64, False, "naive-quantized"),
    "bytes_zeros": _bytes(0, True),
    "bytes_one": Kind(
        scheme(8, 0, True, "int-quantized", "tensor"),
        lambda c: in_bytes(c, one=True),
        8,
        0,
        False,
        one_scale=True,
    ),
}


def write(
    folder: Path, name: str, dtype: str | None = None, config: dict = CONFIG
) -> dict[str, np.ndarray]:
    """A checkpoint of KINDS[name]; dtype: of scales, if not the kind's. Returns all weights, those
    of quantised layers in float64."""
    kind = KINDS[name]
    weights: dict[str, np.ndarray] = tiny.make_weights(config, seed=len(name))
    tensors: Tensors = {}
    random = np.random.RandomState(1)
    orders: dict[str, np.ndarray] = {}  # of inputs
    for key, values in list(weights.items()):
        layer = key.removesuffix(".weight")
        if not layer.endswith("_proj"):
            tensors[key] = weights[key] = values.astype("f2")
            continue
        if kind.one_scale:
            values = values / np.abs(values).max(1, keepdims=True) * 0.25  # the same in each row
        before, _, own = layer.rpartition(".")
        inputs = layer if kind.apart else f"{before}.{SHARES.get(own, own)}"
        if kind.ordered and inputs not in orders:
            orders[inputs] = random.permutation(values.shape[1])
        order = orders.get(inputs)
        codes = quantize(values, kind.bits, kind.group, kind.zeros, order, dtype or kind.dtype)
        weights[key] = codes.weights()
        tensors |= {f"{layer}.{part}": v for part, v in kind.pack(codes).items()}
    write_folder(folder, config | {"quantization_config": kind.config}, tensors)
    return weights


def write_folder(folder: Path, config: dict, tensors: Tensors) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(
        {k: np.ascontiguousarray(v) for k, v in tensors.items()}, folder / "model.safetensors"
    )
