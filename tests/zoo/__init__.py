"""A zoo of small architectures, each taken from capture to ONNX: `python -m tests.zoo` prints what works."""

from tests.zoo.entry import Entry


def entries() -> list[Entry]:
    """Every architecture of the zoo."""
    from tests.zoo import plain, timm_models, transformers_other, transformers_text

    modules = (transformers_text, transformers_other, timm_models, plain)
    return [entry for module in modules for entry in module.ENTRIES]
