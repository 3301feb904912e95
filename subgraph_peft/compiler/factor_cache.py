"""What `prepare` computes from weights, kept on disk by the weights' content."""

import hashlib
import json
import os
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..base.errors import CacheWarning, MethodError
from ..base.files import replacing
from ..graph.site import Site
from ..method.method import Method, spell

FORMAT = 1
SUM = "crc32"
SLICE = 2**22  # words of a weight that are hashed at a time
SEEDS = (0x2545F4914F6CDD1D, -0x61C8864680B583EB)
MULTIPLIERS = (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)  # of splitmix64, as signed numbers


class Cache:
    """A folder of safetensors files, one for what a method with its options computes from one weight.

    A file's name hashes the weight's bits, its shape and dtype, the site's name, the method with all options and the
    kind of device. Another method under the same name and options, such as one whose `prepare` was changed, needs
    another folder. A file is written whole or not at all; a damaged one is computed again, with a CacheWarning. Nothing
    is ever deleted.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = Path(folder)

    def key(self, method: Method, site: Site, W: torch.Tensor) -> str:
        described = {
            "format": FORMAT,
            "weight": [f"{part:016x}" for part in content_hash(W)],
            "shape": list(W.shape),
            "dtype": str(W.dtype),
            "device": W.device.type,
            "site": site.name,
            "method": [type(method).__module__, type(method).__qualname__, spell(method)],
        }
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()

    def path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def read(self, key: str) -> dict[str, torch.Tensor] | None:
        """The values under a key, on the CPU; None where there are none, or damaged ones."""
        path = self.path(key)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                known = (file.metadata() or {}).get(SUM)
                values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            return damaged(path, str(error))
        return values if known == checksum(values) else damaged(path, "its contents changed")

    def write(self, key: str, values: Mapping[str, torch.Tensor]) -> None:
        """Raises MethodError where the folder cannot be written to."""
        own = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in values.items()}
        with replacing(self.path(key), MethodError) as temporary:
            save_file(own, temporary, metadata={SUM: checksum(own)})


def damaged(path: Path, why: str) -> None:
    warnings.warn(f"{path} is damaged ({why}); its values are computed again.", CacheWarning, stacklevel=3)


def checksum(values: Mapping[str, torch.Tensor]) -> str:
    total = 0
    for name in sorted(values):
        total = zlib.crc32(name.encode(), total)
        total = zlib.crc32(values[name].reshape(-1).view(torch.uint8).numpy(), total)
    return f"{total:08x}"


def content_hash(W: torch.Tensor) -> tuple[int, int]:
    """Two 64-bit hashes of the bits of W: Σ mix(2³² wᵢ + i, seed) mod 2⁶⁴ over its 32-bit words wᵢ, mix of splitmix64.

    Computed on W's device, which waits once; equal on all. As far as mix behaves like a random function, some two of n
    different weights share their pair with a chance of n² / 2¹²⁹: for a million weights, 10⁻²⁷.
    """
    words = W.detach().contiguous().reshape(-1).view(torch.int32)
    total = torch.zeros(len(SEEDS), dtype=torch.int64, device=W.device)
    for start in range(0, len(words), SLICE):
        part = words[start : start + SLICE].to(torch.int64)
        place = torch.arange(start, start + len(part), dtype=torch.int64, device=W.device)
        total += torch.stack([mixed((part << 32) ^ place, seed).sum() for seed in SEEDS])
    first, second = (part % 2**64 for part in total.tolist())
    return first, second


def mixed(z: torch.Tensor, seed: int) -> torch.Tensor:
    """Every bit of a 64-bit number, spread over all; arithmetic shifts, which keep it invertible."""
    z = z ^ seed
    for shift, multiplier in zip((30, 27), MULTIPLIERS, strict=True):
        z = (z ^ (z >> shift)) * multiplier
    return z ^ (z >> 31)
