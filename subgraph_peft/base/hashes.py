"""Hashes of tensors, by which files and processes tell weights apart."""

import hashlib

import torch

SAMPLED = 256


def sample(tensor: torch.Tensor) -> bytes:
    """Up to 256 values, evenly spread, with their shape; floating-point ones as float64, which holds each of them, so
    that the same numbers in another width are the same."""
    flat = tensor.detach().flatten()
    values = flat[:: max(1, flat.numel() // SAMPLED)][:SAMPLED]
    return f"{list(tensor.shape)}".encode() + raw(values.double() if values.is_floating_point() else values)


def raw(tensor: torch.Tensor) -> bytes:
    """Every byte of the values, in order."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def sampled(tensor: torch.Tensor) -> str:
    """SHA-256 of a `sample`."""
    return hashlib.sha256(sample(tensor)).hexdigest()


def digest(tensor: torch.Tensor) -> str:
    """SHA-256 of dtype, shape and every byte."""
    hashed = hashlib.sha256(f"{tensor.dtype}{list(tensor.shape)}".encode())
    hashed.update(memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
    return hashed.hexdigest()
