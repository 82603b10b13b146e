"""PyTorch runners with the same weights on the same device, for tools/bench/gpu.py."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

Weights = dict[str, torch.Tensor]


def layer_step(
    x: torch.Tensor,
    position: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor],
    cache: tuple[torch.Tensor, torch.Tensor],
    weights: tuple[torch.Tensor, ...],
) -> torch.Tensor:
    """One layer for one token. x: [1, H]; position: [1]; angles: [S, d]; cache: [kv heads, S, d].
    Shapes are the same for every layer, so it is compiled once."""
    norm, qkv, output, ffn_norm, gate_up, down = weights
    keys, values = cache
    kv_heads, _, d = keys.shape
    parts = F.linear(F.rms_norm(x, norm.shape, norm, 1e-5), qkv).view(-1, d)
    cos, sin = (table[position] for table in angles)

    def rotate(v: torch.Tensor) -> torch.Tensor:
        first, second = v.chunk(2, dim=-1)
        return v * cos + torch.cat((-second, first), dim=-1) * sin

    q, k, v = parts.split((len(parts) - 2 * kv_heads, kv_heads, kv_heads))
    keys.index_copy_(1, position, rotate(k).unsqueeze(1))
    values.index_copy_(1, position, v.unsqueeze(1))
    seen = torch.arange(keys.shape[1], device=x.device) <= position
    attended = F.scaled_dot_product_attention(
        rotate(q)[None, :, None], keys[None], values[None], attn_mask=seen[None], enable_gqa=True
    )
    x = x + F.linear(attended.reshape(1, -1), output)
    gate, up = F.linear(F.rms_norm(x, ffn_norm.shape, ffn_norm, 1e-5), gate_up).chunk(2, dim=-1)
    return x + F.linear(F.silu(gate) * up, down)


def recorded(step: Callable[[], object], device: str) -> Callable[[], object]:
    """The step as one CUDA graph; on other devices unchanged."""
    if device != "cuda":
        return step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # which computes the step's tensors
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


class Shape:
    def __init__(self, config: dict) -> None:
        self.layers, self.hidden = config["num_hidden_layers"], config["hidden_size"]
        self.kv_heads = config["num_key_value_heads"]
        self.head_dim = self.hidden // config["num_attention_heads"]
        per_layer = self.hidden * (2 * self.hidden + 2 * self.kv_heads * self.head_dim)
        per_layer += 3 * self.hidden * config["intermediate_size"]
        self.weight_bytes = 2 * (self.layers * per_layer + config["vocab_size"] * self.hidden)

    def bytes_per_token(self, context: int) -> int:
        return self.weight_bytes + 4 * self.layers * self.kv_heads * self.head_dim * context


class Compiled:
    """A static cache, layers by torch.compile, the whole step in one CUDA graph, greedy."""

    def __init__(self, config: dict, weights: Weights, device: str, length: int) -> None:
        self.shape = shape = Shape(config)
        self.embedding = weights["model.embed_tokens.weight"]
        self.head = weights.get("lm_head.weight", self.embedding)
        self.norm = weights["model.norm.weight"]
        self.layers = []
        for layer in range(shape.layers):
            prefix = f"model.layers.{layer}."

            def part(*names: str, prefix: str = prefix) -> torch.Tensor:
                return torch.cat([weights.pop(f"{prefix}{name}.weight") for name in names])

            self.layers.append(
                (
                    part("input_layernorm"),
                    part(*(f"self_attn.{p}_proj" for p in "qkv")),
                    part("self_attn.o_proj"),
                    part("post_attention_layernorm"),
                    part("mlp.gate_proj", "mlp.up_proj"),
                    part("mlp.down_proj"),
                )
            )
        half = torch.arange(0, shape.head_dim, 2, device=device) / shape.head_dim
        angles = torch.arange(length, device=device)[:, None] / config["rope_theta"] ** half
        angles = torch.cat((angles, angles), dim=-1)
        self.angles = angles.cos().bfloat16(), angles.sin().bfloat16()
        size = (2, shape.layers, shape.kv_heads, length, shape.head_dim)
        self.keys, self.values = torch.zeros(size, device=device, dtype=torch.bfloat16)
        self.token = torch.zeros(1, device=device, dtype=torch.int64)
        self.position = torch.zeros(1, device=device, dtype=torch.int64)
        self.result = torch.zeros(config["vocab_size"], device=device)
        self.layer = torch.compile(layer_step, fullgraph=True) if device == "cuda" else layer_step
        with torch.inference_mode():
            self.step = recorded(self._step, device)

    def _step(self) -> None:
        with torch.inference_mode():
            x = self.embedding[self.token]
            for i, weights in enumerate(self.layers):
                cache = self.keys[i], self.values[i]
                x = self.layer(x, self.position, self.angles, cache, weights)
            logits = F.linear(F.rms_norm(x, self.norm.shape, self.norm, 1e-5), self.head)
            self.result.copy_(logits[0])
            self.token.copy_(logits.argmax(dim=-1))
            self.position += 1

    def logits(self, tokens: list[int]) -> np.ndarray:
        self.position.zero_()
        for token in tokens:
            self.token.fill_(token)
            self.step()
        return self.result.cpu().numpy()

    def decode_loop(self, context: int, new: int) -> Callable[[], None]:
        def loop() -> None:
            self.position.fill_(context)
            for _ in range(new):
                self.step()

        return loop

    def bytes_per_token(self, context: int) -> int:
        return self.shape.bytes_per_token(context)


class Products:
    """Only the matrix-vector products, by cuBLAS: a lower bound for runners that use it."""

    def __init__(self, compiled: Compiled, device: str) -> None:
        self.bytes = compiled.shape.weight_bytes
        matrices = [m for layer in compiled.layers for m in layer if m.dim() > 1]
        matrices.append(compiled.head)
        sizes = {m.shape[1] for m in matrices}
        vectors = {n: torch.ones(1, n, device=device).bfloat16() for n in sizes}

        def step() -> None:
            with torch.inference_mode():
                for m in matrices:
                    F.linear(vectors[m.shape[1]], m)

        self.step = recorded(step, device)

    def decode_loop(self, context: int, new: int) -> Callable[[], None]:
        return lambda: [self.step() for _ in range(new)]

    def bytes_per_token(self, context: int) -> int:
        return self.bytes


class Transformers:
    """generate() with a static cache and its own random weights. It compiles the model."""

    def __init__(self, config: dict, device: str) -> None:
        from transformers import AutoModelForCausalLM, LlamaConfig

        self.shape, self.device = Shape(config), device
        with torch.device(device):
            settings = LlamaConfig(**{k: v for k, v in config.items() if k != "architectures"})
            self.model = AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16).eval()

    def decode_loop(self, context: int, new: int) -> Callable[[], None]:
        ids = torch.ones((1, context), device=self.device, dtype=torch.int64)

        def loop() -> None:  # includes the prompt, which is short compared with the new tokens
            self.model.generate(
                ids, max_new_tokens=new, min_new_tokens=new, do_sample=False,
                cache_implementation="static", pad_token_id=0,
            )  # fmt: skip

        return loop

    def bytes_per_token(self, context: int) -> int:
        return self.shape.bytes_per_token(context)


def make(config: dict, weights: Weights, device: str, length: int, with_transformers: bool) -> dict:
    """Peers by name. Moves the weights out of the dict, so that memory holds them once."""
    compiled = Compiled(config, weights, device, length)
    peers = {"torch, compiled": compiled, "matrix products alone": Products(compiled, device)}
    if with_transformers and importlib.util.find_spec("transformers"):
        peers["transformers, static cache"] = Transformers(config, device)
    return peers
