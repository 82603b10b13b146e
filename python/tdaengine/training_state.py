"""How far the training of a predictor has come, in a file that a later run goes on from."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch  # type: ignore[import-not-found,unused-ignore]
from numpy.typing import NDArray
from safetensors.torch import load, save  # type: ignore[import-not-found,unused-ignore]

from . import __version__
from ._native import OptionError
from .files import MAX_DATA, check_output, read, write

Tensors = dict[str, torch.Tensor]  # of one layer: first, second and, with experts, expert_of


class State:
    """How far a training has come: what is done, and the layer under way with its optimiser."""

    def __init__(self, path: Path, header: str, save_seconds: float) -> None:
        self.path, self.header, self.save_seconds = path, header, save_seconds
        self.done: list[Tensors] = []
        self.now: Tensors = {}
        self.saved = time.monotonic()

    @classmethod
    def open(
        cls,
        path: Path,
        header: dict[str, Any],
        save_seconds: float,
    ) -> State:
        """What stands in the file, if it is there. header: what a training must have in common with
        one that goes on. Raises OptionError for a file of something else."""
        check_output(path)
        header = {"tdaengine": __version__, "torch": torch.__version__, **header}
        state = cls(path, json.dumps(header), save_seconds)
        if not path.exists():
            return state
        content = read(path, "a training's state", 10 * MAX_DATA, OptionError)
        try:
            tensors = load(content)
            size = int.from_bytes(content[:8], "little")
            found = json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["training"])
        except Exception as error:
            raise OptionError(f"{path}: found something else than a training's state") from error
        for name, expected in header.items():
            if found.get(name) != expected:
                raise OptionError(
                    f"{path}: this is of another training: {name}: found {found.get(name)!r}, "
                    f"expected {expected!r}; delete the file to begin anew"
                )
        state.now = {
            name.removeprefix("now."): tensors.pop(name)
            for name in list(tensors)
            if name.startswith("now.")
        }
        for name, tensor in sorted(tensors.items(), key=lambda item: int(item[0].split(".")[1])):
            _, layer, part = name.split(".")
            if int(layer) == len(state.done):
                state.done.append({})
            state.done[int(layer)][part] = tensor
        return state

    def expert_of(self, layer: int) -> NDArray[np.int32] | None:
        if layer >= len(self.done):
            return None
        groups: NDArray[np.int32] = self.done[layer]["expert_of"].numpy()
        return groups

    def resume(self, trained: list[torch.Tensor], optimizer: torch.optim.Optimizer) -> int:
        """Puts everything back where pause() saw it. Returns the steps done in this layer."""
        if not self.now:
            return 0
        settings = optimizer.state_dict()
        for i, tensor in enumerate(trained):
            tensor.data.copy_(self.now[f"{i}.value"])
            names = ("step", "exp_avg", "exp_avg_sq")
            settings["state"][i] = {name: self.now[f"{i}.{name}"] for name in names}
        optimizer.load_state_dict(settings)
        step = int(self.now["0.step"])
        self.now = {}
        return step

    def pause(
        self, trained: list[torch.Tensor], optimizer: torch.optim.Optimizer, step: int
    ) -> None:
        """After an epoch; written now and then."""
        if time.monotonic() - self.saved < self.save_seconds:
            return
        now = {}
        for i, tensor in enumerate(trained):
            now[f"now.{i}.value"] = tensor.detach()
            for name, value in optimizer.state[tensor].items():
                now[f"now.{i}.{name}"] = value
        write(self.path, save(named(self.done) | now, {"training": self.header}))
        self.saved = time.monotonic()

    def finish(self, tensors: Tensors) -> None:
        self.done.append(tensors)


def named(layers: Sequence[Tensors]) -> Tensors:
    return {
        f"layers.{layer}.{name}": tensor
        for layer, tensors in enumerate(layers)
        for name, tensor in tensors.items()
    }
