"""Zoo models of timm, small. Without timm there are none: `pip install --no-deps timm`."""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tests.models import made
from tests.zoo.entry import Entry

BATCH, CLASSES = 3, 5
INSTALLED = importlib.util.find_spec("timm") is not None
# what timm imports of torchvision: a frozen norm, transforms and data sets, none of which its models use
NAMES = ("", ".ops", ".ops.misc", ".transforms", ".transforms.functional", ".datasets")


class Nothing(type):
    """A class whose every attribute is its name."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class Absent(ModuleType):
    """A module whose every name is such a class."""

    __path__: tuple[str, ...] = ()

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return Nothing(name, (), {})


@contextmanager
def without_torchvision() -> Iterator[None]:
    """Lets timm be imported where torchvision is missing: it imports torchvision at its top, for data and transforms,
    and releases of torchvision fit one release of torch alone. The stand-in is gone again afterwards."""
    if importlib.util.find_spec("torchvision") is not None:
        yield
        return
    names = [f"torchvision{name}" for name in NAMES]
    for name in names:
        sys.modules[name] = Absent(name)
        sys.modules[name].__spec__ = ModuleSpec(name, None)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, sys.modules[name])
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


class Classifier(nn.Module):
    """A timm model with its loss."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, image: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        logits = self.model(image)
        return {"logits": logits} | ({} if labels is None else {"loss": F.cross_entropy(logits, labels)})


def image_model(name: str, architecture: str, size: int = 32, **options: Any) -> Entry:
    """An entry for `create(architecture, …)` with square images of `size`.

    entry: (option) further fields of the entry
    """
    fields = options.pop("entry", {})

    def inputs() -> dict[str, torch.Tensor]:
        return {"image": torch.randn(BATCH, 3, size, size), "labels": torch.arange(BATCH) % CLASSES}

    return Entry(name, "timm", lambda: made(lambda: Classifier(create(architecture, **options)), inputs), **fields)


def create(architecture: str, **options: Any) -> nn.Module:
    """A model by the name of its architecture, or a class of timm.models by its path."""
    with without_torchvision():
        import timm
    if "." not in architecture:
        return timm.create_model(architecture, pretrained=False, num_classes=CLASSES, **options)
    module, _, name = architecture.partition(".")
    return getattr(getattr(timm.models, module), name)(num_classes=CLASSES, **options)


VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}

MODELS = [
    image_model("ResNet", "resnet10t", channels=(8, 12, 16, 20)),
    image_model("vision transformer", "vit_tiny_patch16_224", **VIT, drop_rate=0.1, entry={"fast": True}),
    image_model("DeiT, distilled", "deit_tiny_distilled_patch16_224", **VIT),
    image_model("ConvNeXt", "convnext_atto", depths=(1, 1, 1, 1), dims=(8, 12, 16, 20), drop_path_rate=0.1),
    image_model("MobileNetV3", "mobilenetv3_small_050"),
    image_model("EfficientNet", "tinynet_e", 64, drop_path_rate=0.1),
    image_model("MLP-Mixer (timm)", "mlp_mixer.MlpMixer", img_size=32, patch_size=8, num_blocks=2, embed_dim=24),
    image_model("Swin", "swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=12, depths=(1, 1),
                num_heads=(2, 3), drop_path_rate=0.1),
    image_model("LeViT", "levit_128s", 64, img_size=64, embed_dim=(16, 24, 32), num_heads=(2, 3, 4), depth=(1, 1, 1),
                key_dim=8),
    image_model("CoaT", "coat_lite_tiny", img_size=32, embed_dims=(16, 24, 32, 40), serial_depths=(1, 1, 1, 1),
                num_heads=8),
    image_model("MaxViT", "maxvit_rmlp_pico_rw_256", 64, img_size=64, embed_dim=(32, 32, 32, 32), depths=(1, 1, 1, 1),
                stem_width=8),
    image_model("DenseNet", "densenet121", growth_rate=8, block_config=(2, 2)),
    image_model("XCiT", "xcit_nano_12_p8_224", img_size=32, embed_dim=24, depth=2, num_heads=3),
    image_model("PoolFormer", "metaformer.MetaFormer", depths=(1, 1, 1, 1), dims=(8, 12, 16, 20)),
    image_model("EVA", "eva02_tiny_patch14_224", **VIT, head_init_scale=1.0),
]  # fmt: skip

ENTRIES = MODELS if INSTALLED else []
