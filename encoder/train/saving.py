"""The trained model in the layout of sentence-transformers, which `--encoder-model` and `shoal encoder
serve` load: a copy of the folder that it came from, with new weights and a card."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from encoder.families import Family
from encoder.model import ModelFolder
from encoder.parallel import Stage, join_fused
from shoal.errors import must

__all__ = ["save_model", "unfused", "whole_parameters"]

# Weights in other formats would be those from before; code is not ours to hand on.
_LEFT_OUT = {
    *(".py", ".bin", ".pt", ".onnx", ".h5", ".msgpack", ".ot", ".safetensors"),
    *("onnx", "openvino", "model.safetensors.index.json", ".git"),
}


def whole_parameters(stage: Stage, mesh: DeviceMesh) -> dict[str, torch.Tensor]:
    """All parameters by their names in the whole model, on the CPU; in rank 0, empty elsewhere.
    Collective over the mesh."""
    own: dict[str, torch.Tensor] = {}
    for name, tensor in stage.network.named_parameters():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        own[name] = whole.detach().cpu()
    if mesh["pp"].size() == 1:
        return own if dist.get_rank() == 0 else {}
    if mesh["dp"].get_local_rank() or mesh["tp"].get_local_rank():
        return {}
    place = mesh["pp"].get_local_rank()
    parts: list[dict[str, torch.Tensor] | None] | None = None
    if place == 0:
        parts = [None] * mesh["pp"].size()
    dist.gather_object(own, parts, group=mesh["pp"].get_group(), group_dst=0)
    if parts is None:
        return {}
    return {name: tensor for part in parts if part is not None for name, tensor in part.items()}


def save_model(
    source: ModelFolder,
    parameters: Mapping[str, torch.Tensor],
    out: Path,
    *,
    family: Family,
    tp: int,
    card: str,
) -> None:
    """source      the folder that the model was loaded from.
    parameters  as `whole_parameters` gives them.
    tp          fused matrices were reordered for so many processes; they are put back.
    Takes the place of what is in `out`, when all is written. Raises OSError.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    kept, metadata = _as_in_file(source.path, unfused(parameters, family, tp))
    scratch = out.with_name(out.name + ".tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        shutil.copytree(source.path, scratch, ignore=_not_copied)
        save_file(kept, scratch / "model.safetensors", metadata)
        (scratch / "model.safetensors").chmod(0o644)
        (scratch / "README.md").write_text(card, encoding="utf-8")
        shutil.rmtree(out, ignore_errors=True)
        scratch.replace(out)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(scratch, ignore_errors=True)
        raise OSError(f"The model could not be written to {out}: {error}") from error


def _as_in_file(
    folder: Path, tensors: Mapping[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The weights under the names that the folder's files have for them, with those that sentence
    embeddings do not use; and the files' metadata."""
    from safetensors import safe_open

    whole = folder / "model.safetensors"
    kept: dict[str, torch.Tensor] = {}
    used: set[str] = set()
    metadata: dict[str, str] = {}
    for path in [whole] if whole.is_file() else sorted(folder.glob("model-*.safetensors")):
        with safe_open(path, "pt") as file:
            metadata |= file.metadata() or {"format": "pt"}
            for key in file.keys():  # noqa: SIM118 - not a mapping
                name = _name_in_network(key, tensors)
                if name is None:
                    kept[key] = file.get_tensor(key)
                else:
                    kept[key] = tensors[name].contiguous()
                    used.add(name)
    missing = sorted(set(tensors) - used)
    must(not missing, f"weights without a place in the file: {missing}")
    return kept, metadata


def _not_copied(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if Path(name).suffix in _LEFT_OUT or name in _LEFT_OUT]


def _name_in_network(key: str, tensors: Mapping[str, torch.Tensor]) -> str | None:
    """Files of some models put the name of the model in front: bert.encoder.layer.0..."""
    return next((name for name in (key, key.partition(".")[2]) if name in tensors), None)


def unfused(
    parameters: Mapping[str, torch.Tensor], family: Family, tp: int
) -> dict[str, torch.Tensor]:
    """The same with the rows of fused matrices in the order of one process."""
    if tp == 1 or not family.fused:
        return dict(parameters)
    tree = torch.nn.Module()
    for name, tensor in parameters.items():
        module = tree
        *path, leaf = name.split(".")
        for part in path:
            if part not in module._modules:
                module.add_module(part, torch.nn.Module())
            module = module.get_submodule(part)
        module.register_parameter(leaf, torch.nn.Parameter(tensor.clone(), requires_grad=False))
    join_fused(tree, family, tp)
    return {name: tensor.detach() for name, tensor in tree.named_parameters()}
