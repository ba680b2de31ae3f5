"""Repositories of random bits, for weight differences."""

import json

import torch
from safetensors.torch import save_file

BYTES = {
    "bfloat16": 2,
    "float16": 2,
    "float32": 4,
    "float64": 8,
    "int8": 1,
    "uint8": 1,
    "int64": 8,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "complex64": 8,
}


def bits(*shape, dtype="float32", seed=0):
    """Random bit patterns: NaN, infinities and subnormal numbers among them."""
    generator = torch.Generator().manual_seed(seed)
    count = torch.Size(shape).numel() * BYTES[dtype]
    return (
        torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator).view(getattr(torch, dtype)).view(shape)
    )


def base_tensors(dtype="float32"):
    return {
        "embed.weight": bits(11, 6, dtype=dtype),
        "layer.weight": bits(6, 7, dtype=dtype, seed=1),
        "layer.bias": bits(5, dtype=dtype, seed=2),
        "layer.frozen": bits(4, 3, dtype=dtype, seed=3),
        "scale": bits(dtype=dtype, seed=4),
        "nothing": bits(0, 3, dtype=dtype),
        "rotary.inv_freq": bits(4, seed=5),
    }


def converted_tensors(dtype="float32"):
    """Three tensors differ, one is equal, one has more rows, one another dtype, two are new, one is gone."""
    tensors = base_tensors(dtype)
    del tensors["rotary.inv_freq"]
    other = "float16" if dtype != "float16" else "float32"
    return tensors | {
        "embed.weight": bits(12, 6, dtype=dtype, seed=6),
        "layer.weight": bits(6, 7, dtype=dtype, seed=7),
        "layer.bias": bits(5, dtype=dtype, seed=8),
        "layer.mask": torch.tensor([True, False, True]),
        "layer.mixer.map": bits(3, 5, seed=9),
        "layer.frozen": bits(4, 3, dtype=other, seed=10),
        "scale": bits(dtype=dtype, seed=11),
    }


def write(path, tensors, shards=1, **files):
    """A repository of tensors, in one file or in several."""
    path.mkdir(parents=True)
    (path / "config.json").write_text('{"model_type": "toy"}')
    for name, text in files.items():
        (path / name).write_text(text)
    if shards == 1:
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return path
    places = {}
    for i in range(shards):
        name = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(tensors.items())[i::shards])
        save_file(part, path / name, metadata={"format": "pt", "shard": str(i)})
        places |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def contents(path):
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def made_diff(root):
    """A folder with a base, a converted model and their difference."""
    from linearize.hub.diff.difference import make_diff

    write(root / "base", base_tensors())
    write(root / "converted", converted_tensors(), **{"vocab.txt": "words"})
    make_diff(root / "base", root / "converted", root / "diff")
    return root
